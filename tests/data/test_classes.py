"""Classes that should be the same and are not."""

from types import SimpleNamespace

import pytest

from gfl_jax import evaluate as evaluation
from gfl_jax.config import Experiment
from gfl_jax.data.classes import class_error
from gfl_jax.errors import InputError
from gfl_jax.training.start import check
from gfl_jax.training.step import Train

CAT_DOG = [(1, "cat"), (2, "dog")]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([(1, "dog"), (2, "cat")], "same classes under other ids .* 1 'dog', 2 'cat'"),
        ([(0, "cat"), (1, "dog")], "same classes under other ids .* 0 'cat', 1 'dog'"),
        ([(1, "cat"), (2, "cow")], "other classes .*training 2 'dog'; evaluation 2 'cow'"),
        ([(1, "cat")], "other classes .*training 2 'dog'; evaluation no other"),
        ([(1, "Cat "), (2, "dog")], "letter by letter: these differ in case, in blanks or in how"),
    ],
)
def test_training_and_evaluation_must_mean_the_same_by_every_id(theirs, said):
    splits = [
        SimpleNamespace(category_ids=[i for i, _ in its], category_names=[n for _, n in its])
        for its in (CAT_DOG, theirs)
    ]
    with pytest.raises(InputError, match=said):
        check(Train(), SimpleNamespace(count=1), *splits)
    check(Train(), SimpleNamespace(count=1), splits[0], splits[0])


@pytest.mark.parametrize("theirs", [[(1, "dog"), (2, "cat")], [(1, "cat")], [(1, "cow")]])
def test_evaluation_wants_the_classes_that_were_trained(monkeypatch, theirs):
    def of(classes):
        return {"category_ids": [i for i, _ in classes], "category_names": [n for _, n in classes]}

    run = SimpleNamespace(experiment=Experiment(), **of(CAT_DOG))
    monkeypatch.setattr(evaluation, "load", lambda _: run)
    monkeypatch.setattr(evaluation, "open_split", lambda *_: SimpleNamespace(**of(theirs)))
    with pytest.raises(InputError, match="the checkpoint and the data have"):
        evaluation.main(["RUN"])


def test_names_that_look_alike_are_said_to_differ():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    said = str(class_error("a", [(1, composed)], "b", [(1, decomposed)]))
    assert "how Unicode writes an accent" in said
    assert "Unicode" not in str(class_error("a", [(1, "tea")], "b", [(1, composed)]))


def test_long_lists_are_cut():
    many = [(i, f"class {i}") for i in range(80)]
    assert "(79 in all)" in str(class_error("a", many, "b", [(79, "class 79")]))
