"""The table runner, on a made-up table of two kinds of rows and a network that compiles at once."""

import dataclasses
import json
import re

import cv2
import numpy as np
import pytest

from gfl_jax import run as run_module
from gfl_jax.config import Data, Experiment, Row
from gfl_jax.errors import UsageError
from gfl_jax.models.ssd import SSDModel
from gfl_jax.systems import ssd512
from gfl_jax.tools import tables
from gfl_jax.tools.tables import COLUMNS, TABLES, data_of, jobs_of, markdown, small
from gfl_jax.training import evaluator

DATA = """
from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import Shapes

experiment = Experiment(
    data=Data(
        source=Shapes(num_train=20, num_val=8, image_size=(64, 64), cache_dir={cache!r}),
        workers=0,
    )
)
"""
TABLE = """
from gfl_jax.config import Data, Experiment, Row, Train
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.detectors.inference import Inference
from gfl_jax.systems import variant

base = Experiment(
    data=Data(scale=(64, 64)),
    train=Train(batch_size=8, lr=0.02, epochs=2, milestones=(1,), warmup_steps=2),
)
base = variant(base, detector={"inference": Inference(score_threshold=0.0, nms_pre=60)})

rows = {
    "two": Row("beta 2", base, (39.9, 58.5, 43.0)),
    "again": Row("beta 2 again", base, (40.2, 58.6, 43.4, 23.0, 44.3, 53.0)),
    "zero": Row("beta 0", variant(base, detector={"classification": QualityFocal(0.0)}), (37.6,)),
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    (folder / "configs").mkdir()
    (folder / "configs" / "table_1a.py").write_text(TABLE)
    (folder / "data.py").write_text(DATA.format(cache=str(folder / "cache")))
    return folder


@pytest.fixture
def run(folder, linear_network, monkeypatch):
    """run(**fields): the program on the made-up table; returns the work directories it fitted."""
    fitted = []
    fit = tables.fit

    def counted(*arguments, workdir, **others):
        fitted.append(workdir)
        fit(*arguments, workdir=workdir, **others)

    monkeypatch.setattr(tables, "Network", linear_network)
    monkeypatch.setattr(tables, "fit", counted)

    def run(out="out", **fields):
        fitted.clear()
        configs = {"configs": folder / "configs", "out": folder / out}
        tables.main(("1a",), **{"data": str(folder / "data.py"), "rows": "*", **configs, **fields})
        return [workdir.relative_to(folder / out).as_posix() for workdir in fitted]

    return run


def test_every_row_is_trained_once_for_each_seed_and_never_again(run, folder, capsys):
    assert run(seeds=1) == ["1a_two/seed0", "1a_zero/seed0"]
    assert run(seeds=2) == ["1a_two/seed1", "1a_zero/seed1"]
    assert run(seeds=2) == []
    text = (folder / "out" / "table_1a.md").read_text()
    assert text in capsys.readouterr().out
    assert run(seeds=2, only_list=True) == []
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "table 1a"
    assert [line.split()[0] for line in listed[1:]] == ["two", "again", "zero"]
    assert all(line.endswith("finished: seed 0, 1") for line in listed[1:])
    run(seeds=2, only_list=True, out="other")
    assert capsys.readouterr().out.count("not trained") == 3
    head, _, *lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| beta 2", "| beta 2 again", "| beta 0"]
    cells = [dict(zip(head.split("|"), line.split("|"), strict=True)) for line in (*lines,)]
    runs = json.loads((folder / "out" / "table_1a.json").read_text())
    for row, name in zip(cells, ("two", "again", "zero"), strict=True):
        values = 100 * np.array([run["AP50"] for run in runs[name]])
        assert row[" AP50 "] == f" {values.mean():.1f} ± {values.std(ddof=1):.1f} "
        assert row[" seeds "] == " 2 "
    assert [row[" paper AP "] for row in cells] == [" 39.9 ", " 40.2 ", " 37.6 "]
    assert cells[2][" paper AP50 "].strip() == ""
    assert runs["two"] == runs["again"]
    picture = cv2.imread(str(folder / "out" / "table_1a.png"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_an_interrupted_row_continues(run, folder, monkeypatch, capsys):
    class Stop(Exception):
        pass

    original, evaluated = evaluator.Evaluator.__call__, []

    def stop(self, *arguments):
        evaluated.append(self)
        if len(evaluated) == 2:
            raise Stop
        return original(self, *arguments)

    monkeypatch.setattr(evaluator.Evaluator, "__call__", stop)
    with pytest.raises(Stop):
        run(out="interrupted", rows="two", seeds=1)
    assert not (folder / "interrupted" / "1a_two" / "seed0" / "result.json").exists()
    monkeypatch.setattr(evaluator.Evaluator, "__call__", original)
    assert run(out="interrupted", rows="two", seeds=1) == ["1a_two/seed0"]
    assert "nothing left to train; evaluating" in capsys.readouterr().out
    assert run(out="interrupted", rows="two", seeds=1) == []


@pytest.mark.slow
def test_speed_is_the_median_of_runs_in_turn_on_equal_batches(
    run, folder, linear_network, monkeypatch
):
    monkeypatch.setattr(tables, "WITH_SPEED", ("1a",))
    monkeypatch.setattr(run_module, "Network", linear_network)
    measured, original = [], evaluator.Evaluator.images_per_second

    def measure(self, variables, repeats):
        assert original(self, variables, 1)[0] > 0
        measured.append(self)
        return 100.0 * len(measured), 0.0

    monkeypatch.setattr(evaluator.Evaluator, "images_per_second", measure)
    run(out="fast", seeds=1)
    assert measured == measured[:3] * 5
    assert len(set(measured)) == 3
    head, _, *lines = (folder / "fast" / "table_1a.md").read_text().splitlines()
    column = head.split("|").index(" images/s ")
    assert [line.split("|")[column] for line in lines] == [" 700.0 ", " 800.0 ", " 900.0 "]


def test_results_of_another_experiment_are_not_taken(run, folder):
    run(out="other", rows="zero")
    file = folder / "other" / "1a_zero" / "seed0" / "result.json"
    kept = json.loads(file.read_text())
    kept["experiment"]["train"]["epochs"] = 3
    file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=re.escape(str(file.parent))):
        run(out="other", rows="zero")


def test_what_cannot_be_run_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="has no row 'fcos_\\*'; it has two, again, zero"):
        run(rows="fcos_*")
    with pytest.raises(UsageError, match="at least one table: 1a, 1b"):
        tables.main(())
    with pytest.raises(UsageError, match="full budget needs --data"):
        tables.main(("1a",))
    with pytest.raises(ValueError, match="no table '4'; there are 1a, 1b"):
        jobs_of("4")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data_of(str(tmp_path / "nowhere"), "full", Data())
    with pytest.raises(FileNotFoundError, match=r"table_1a\.py"):
        jobs_of("1a", tmp_path)


def test_the_papers_rows_that_are_the_same_experiment_share_a_run():
    names = {(table, key): name for table in TABLES for key, (_, name) in jobs_of(table).items()}
    assert len(names) == 12 + 6 + 5 + 8 + 4 + 4 + 4
    same = [
        {("1a", "atss_joint"), ("1c", "beta_2"), ("3", "qfl")},
        {("1a", "atss_centerness_branch"), ("2a", "atss_dirac"), ("3", "neither")},
        {("1a", "fcos_centerness_branch"), ("2a", "fcos_dirac")},
        {("2a", "atss_general_dfl"), ("3", "dfl")},
        {("2b", "n_16"), ("2c", "delta_1"), ("3", "qfl_dfl")},
    ]
    for group in same:
        assert len({names[entry] for entry in group}) == 1
    assert len(set(names.values())) == len(names) - sum(len(group) - 1 for group in same)


def test_small_changes_sizes_and_schedule_but_no_choice():
    for table in TABLES:
        for row, name in jobs_of(table).values():
            experiment = dataclasses.replace(
                row.experiment, data=data_of("shapes", "small", row.experiment.data)
            )
            reduced = small(experiment, 3000)
            same = reduced.detector
            if isinstance(reduced.model, SSDModel):
                same = dataclasses.replace(same, priors=row.experiment.detector.priors)
                assert reduced.data.augmentation == "ssd"
            assert same == row.experiment.detector, name
            assert reduced.data.scale == (128, 128)
            assert reduced.train.epochs * 3000 == pytest.approx(1500 * 8)
            assert reduced.train.bias_lr == row.experiment.train.bias_lr


def test_small_ssd_has_as_many_levels_as_its_images_allow():
    data = data_of("shapes", "small", ssd512.data)
    reduced = small(dataclasses.replace(ssd512, data=data), 3000)
    assert reduced.model.extra_levels + 2 == len(reduced.detector.priors.strides)
    assert reduced.detector.priors.input_size / reduced.detector.priors.strides[-1] == 1


def test_data_comes_from_elsewhere_but_is_seen_as_the_row_says(folder):
    own = Data(scale=(512, 512), keep_ratio=False, augmentation="ssd", repeats=5, flip=0.25)
    found = data_of(f"{folder / 'data.py'}:{folder}", "full", own)
    assert (found.source.root, found.source.num_train) == (str(folder), 20)
    for field in ("scale", "keep_ratio", "augmentation", "repeats", "flip"):
        assert getattr(found, field) == getattr(own, field)
    assert data_of(str(folder), "full", own).source.root == str(folder)
    assert data_of(str(folder), "small", Data()).scale == (192, 144)


def test_the_table_leaves_out_what_was_not_measured():
    run = dict.fromkeys(COLUMNS, 0.25) | {"APL": -1.0, "AP": 0.2}
    other = run | {"AP": 0.3}
    text = markdown([Row("a", Experiment(), (40.2,))], [[run, other]], [])
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")]
    assert cells[1:9] == ["a", "25.0 ± 7.1", "25.0 ± 0.0"] + ["25.0 ± 0.0"] * 3 + ["", "2"]
    text = markdown([Row("a", Experiment(), (40.2,))], [[run]], [12.34])
    assert "| 12.3 |" in text.splitlines()[2]
    assert text.splitlines()[2].rstrip(" |").endswith("19.4")
