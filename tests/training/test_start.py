"""What is said before the first step: of the warm-up, and of a checkpoint from other data."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from gfl_jax.data.records import Table
from gfl_jax.errors import InputError
from gfl_jax.training.start import announce, check_resumed, key_of, with_warmup_that_ends
from gfl_jax.training.step import Train, learning_rate

ABOUT = {
    "category_ids": [1, 2],
    "category_names": ["cat", "dog"],
    "data": {"train": "t", "val": "v"},
    "steps_per_epoch": 4,
}


@pytest.mark.parametrize(
    ("train", "steps_per_epoch", "expected"),
    [
        (Train(), 7330, 500),  # COCO
        (Train(), 63, 500),
        (Train(), 62, 49),  # 496 steps before the first drop
        (Train(epochs=12, milestones=()), 2, 2),
        (Train(epochs=2, milestones=(8, 11)), 1, 0),
        (Train(warmup_steps=0), 1, 0),
        (Train(milestones=(0,), warmup_steps=0), 1, 0),
    ],
)
def test_a_warmup_ends_before_the_learning_rate_drops(train, steps_per_epoch, expected, capsys):
    found = with_warmup_that_ends(train, steps_per_epoch)
    assert found == dataclasses.replace(train, warmup_steps=expected)
    printed = capsys.readouterr().out
    assert (found == train) == ("instead" not in printed)
    assert (steps_per_epoch == 63) == ("takes 500 of the 504 steps before the" in printed)
    if found != train:
        assert f"a warm-up of {train.warmup_steps} steps" in printed
        assert f"takes {expected} instead" in printed
        assert "--train.warmup-steps" in printed


def test_a_tiny_set_trains_at_the_learning_rate_that_is_printed():
    train = with_warmup_that_ends(Train(lr=0.02, batch_size=4), steps_per_epoch=2)
    rates = [float(learning_rate(train, 2)(step)) for step in range(24)]
    assert max(rates) == pytest.approx(0.005)


def test_the_same_data_says_nothing(capsys):
    check_resumed(ABOUT, ABOUT, 8, False)
    check_resumed({}, ABOUT, 0, False)
    earlier_version = {name: ABOUT[name] for name in ("category_ids", "category_names")}
    check_resumed(earlier_version, ABOUT, 8, False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ids", "names", "listed"),
    [
        ([1, 2], ["dog", "cat"], ["1 'dog', 2 'cat'", "1 'cat', 2 'dog'"]),
        ([1, 2], ["cat", "horse"], ["2 'horse'", "2 'dog'"]),
        ([1], ["cat"], ["no other", "2 'dog'"]),
    ],
)
def test_other_classes_stop_with_both_lists(ids, names, listed):
    with pytest.raises(InputError, match="another --workdir") as error:
        check_resumed(ABOUT | {"category_ids": ids, "category_names": names}, ABOUT, 8, False)
    assert f"the checkpoint {listed[0]}; the data {listed[1]}" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": "x"}, ["training data is not what step 8"]),
        ({"val": "x"}, ["`best` starts anew"]),
        ({"train": "x", "val": "x"}, ["training data is not", "`best` starts anew"]),
    ],
)
def test_other_data_is_said_loudly(changed, said, capsys):
    check_resumed(ABOUT | {"data": ABOUT["data"] | changed}, ABOUT, 8, False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said)
    for line, text in zip(lines, said, strict=True):
        assert line.startswith("WARNING: ")
        assert text in line


def test_data_that_was_evaluated_meanwhile_is_not_said_again(capsys):
    check_resumed(ABOUT | {"data": ABOUT["data"] | {"val": "other"}}, ABOUT, 8, True)
    assert not capsys.readouterr().out


def test_epochs_of_another_length_say_where_the_run_is(capsys):
    check_resumed(ABOUT | {"steps_per_epoch": 2}, ABOUT, 6, False)
    printed = capsys.readouterr().out
    assert "an epoch has 4 steps, it had 2" in printed
    assert "step 6 was the end of epoch 3 and is that of epoch 1.5" in printed


@pytest.mark.parametrize(
    ("start", "evaluated", "said"),
    [
        (0, False, "training on 1 images (1 left out: no objects, or under 32 pixels)"),
        (6, False, "resuming from step 6 of 8 (epoch 1.5 of 2) in F"),
        (8, False, "step 8, --train.epochs 2 ends at 8: nothing left to train; evaluating"),
        (9, True, "step 9, --train.epochs 2 ends at 8: nothing left to train"),
    ],
)
def test_where_a_run_is_when_it_starts(start, evaluated, said, capsys):
    plan = SimpleNamespace(steps_per_epoch=4, sizes=[0, 0], indices=[0])
    devices = SimpleNamespace(count=1, kind="cpu")
    announce(plan, Train(epochs=2), devices, start, "F", evaluated)
    first, *_ = capsys.readouterr().out.splitlines()
    assert said in first
    assert ("evaluating" in first) == ("evaluating" in said)


def test_the_key_follows_the_data_and_not_its_place():
    def table(content=1, **changes):
        columns = {
            "image_ids": np.arange(2),
            "filenames": np.array([b"a", b"b"]),
            "sizes": np.full((2, 2), 64, np.int32),
            "starts": np.array([0, 1, 1]),
            "boxes": np.ones((1, 4), np.float32),
            "labels": np.zeros(1, np.int32),
            "crowd": np.zeros(1, bool),
            "rule": np.zeros(1, np.uint8),
        }
        return SimpleNamespace(table=Table(**columns | changes), content=content)

    assert key_of(table()) == key_of(table())
    for changes in (
        {"boxes": np.full((1, 4), 2, np.float32)},
        {"labels": np.ones(1, np.int32)},
        {"filenames": np.array([b"a", b"c"])},
        {"starts": np.array([0, 0, 1])},
        {"crowd": np.ones(1, bool)},
        {"rule": np.ones(1, np.uint8)},
        {"content": 2},
    ):
        assert key_of(table(**changes)) != key_of(table())
