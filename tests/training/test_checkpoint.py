import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from gfl_jax.cli import load_experiment, load_rows
from gfl_jax.config import Experiment, Train, from_dict, to_dict
from gfl_jax.detectors.dense import Detector
from gfl_jax.errors import WriteError
from gfl_jax.models.network import Variables
from gfl_jax.priors import SquareAnchors
from gfl_jax.run import changes_since, describe, experiment_of
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import TrainState, init_state, sgd

ROOT = Path(__file__).parents[2]
TABLES = sorted(ROOT.glob("configs/table_*.py"))
CONFIGS = sorted(set(ROOT.glob("configs/*.py")) - set(TABLES))


def state_of(seed=0, ema_decay=0.0, **arrays):
    """A train state on the host, with values that are easily lost."""
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, -0.0, 1e-42, np.inf], np.float32)
    params = {
        "head.scales.0.scale": np.float32(rng.normal()),
        "backbone.conv1.kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "head.bias": odd,
        **arrays,
    }
    variables = Variables(
        {name: jnp.asarray(value) for name, value in params.items() if value is not None},
        {"backbone.bn1.scale": jnp.ones(4)},
        {"backbone.bn1.mean": jnp.asarray(rng.normal(size=4), jnp.float32)},
    )
    train = Train(ema_decay=ema_decay, clip_norm=1.0)
    optimizer = sgd(train, optax.constant_schedule(0.1))
    state = init_state(variables, optimizer, train)
    return jax.device_get(state._replace(step=jnp.int32(seed)))


def about_of(experiment=None):
    return describe(experiment or Experiment(), [3, 7], ["cat", "dog"])


def restored(folder, like):
    return TrainState.from_items(Checkpoints(folder).restore(like.items()))


def saved(folder, steps, experiment=None, keep=2, **changes):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, state_of(step, **changes).items(), about_of(experiment))
    checkpoints.close()
    return folder


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_state_comes_back_bit_by_bit(tmp_path, ema_decay):
    saved(tmp_path / "c", [5], ema_decay=ema_decay)
    expected = state_of(5, ema_decay)
    like = jax.eval_shape(lambda: state_of(0, ema_decay))
    found = restored(tmp_path / "c", like)
    assert_same_bits(found, expected)
    assert int(found.step) == 5


def test_experiment_and_info_come_back(tmp_path):
    experiment = load_experiment(CONFIGS[0])
    saved(tmp_path / "c", [5], experiment)
    about = Checkpoints(tmp_path / "c").about()
    assert about == about_of(experiment)
    assert experiment_of(about) == experiment


def test_the_newest_ones_stay(tmp_path):
    saved(tmp_path / "two", [2, 4, 10], keep=2)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["10", "4"]
    assert Checkpoints(tmp_path / "two").step == 10
    saved(tmp_path / "one", [1, 2], keep=1)
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["2"]


def test_opening_for_reading_deletes_nothing(tmp_path):
    saved(tmp_path / "checkpoints", [2, 4])
    Checkpoints.find(tmp_path).about()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_a_step_that_exists_is_left_as_it_is(tmp_path):
    saved(tmp_path / "c", [3])
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(3, state_of(9).items(), about_of())
    checkpoints.close()
    assert_same_bits(restored(tmp_path / "c", state_of()), state_of(3))


def test_what_a_killed_save_leaves_is_no_checkpoint(tmp_path):
    program = """
        import os, signal, sys, time
        from pathlib import Path
        import numpy as np
        from gfl_jax.training.checkpoint import Checkpoints

        def state(step):
            values = np.random.default_rng(step).random(1 << (10 if step == 1 else 25))
            return {"state": {"x": np.resize(values, 1 << 25)}}

        folder = Path(sys.argv[1])
        checkpoints = Checkpoints(folder, keep=2)
        checkpoints.save(1, state(1), {})
        checkpoints.close()
        checkpoints = Checkpoints(folder, keep=2)
        checkpoints.save(2, state(2), {})
        while len(os.listdir(folder)) < 2:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(folder.iterdir())) == 2, "nothing was under way"
    found = Checkpoints.find(tmp_path)
    assert found.step == 1
    small = np.random.default_rng(1).random(1 << 10)
    np.testing.assert_array_equal(
        found.restore({"state": {"x": np.empty(1 << 25)}})["state"]["x"],
        np.resize(small, 1 << 25),
    )
    # The step can be saved after all.
    again = Checkpoints(folder, keep=2)
    again.save(2, {"state": {"x": np.ones(3)}}, {})
    again.close()
    assert Checkpoints.find(tmp_path).step == 2


@pytest.mark.parametrize(
    "name", ["7.orbax-checkpoint-tmp-1700000000000000", "7.orbax-checkpoint-tmp"]
)
def test_a_folder_under_a_temporary_name_is_no_checkpoint(tmp_path, name):
    folder = saved(tmp_path / "c", [5, 7])
    (folder / "7").rename(folder / name)
    assert Checkpoints(folder).step == 5
    shutil.rmtree(folder / "5")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        Checkpoints.find(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"head.bias": np.zeros(5, np.float32)},
        {"head.bias": np.zeros((4, 1), np.float32)},
        {"backbone.conv1.kernel": np.zeros((3, 3, 2, 2), np.float32)},
        {"head.bias": None},
        {"head.more": np.zeros(4, np.float32)},
        {"ema_decay": 0.9},
    ],
    ids=["longer", "another rank", "thinner", "one more stored", "one less stored", "averaged"],
)
def test_a_checkpoint_of_another_model_is_named(tmp_path, changes):
    folder = saved(tmp_path / "c", [5])
    with pytest.raises(ValueError, match="another model or") as error:
        restored(folder, state_of(**changes))
    assert str(folder / "5") in str(error.value)
    for name in changes:  # averaging is another tree of parameters
        assert name.replace("ema_decay", "training.2.") in str(error.value)
    assert re.search(
        r" is (missing|float32\[.*?\]), expected (none|float32\[.*?\])", str(error.value)
    )


def test_what_cannot_be_read_is_not_called_another_model(tmp_path, monkeypatch):
    folder = saved(tmp_path / "c", [5])

    def fails(*_, **__):
        raise ValueError("of the library's own")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)
    with pytest.raises(ValueError, match=r"cannot be read.*library's own") as error:
        restored(folder, state_of())
    assert "another model" not in str(error.value)


@pytest.mark.parametrize("name", ["gfl[lr0.01]", "gfl*", "what?", "a\\b", "\udce9"])
def test_a_folder_that_orbax_could_not_use_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\* \? \[ \\|not valid UTF-8") as error:
        Checkpoints(tmp_path / name / "checkpoints", writes=True)
    assert str(tmp_path / name) in str(error.value) or "UTF-8" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_reader_goes_on_to_the_next_when_a_run_deletes_what_it_saw(tmp_path):
    with Checkpoints(tmp_path / "c", writes=True) as run:
        run.save(1, {"state": {"x": np.full(3, 1.0)}}, {"n": 1})
        run.wait()
        reader = Checkpoints(tmp_path / "c")
        assert reader.about() == {"n": 1}
        run.save(2, {"state": {"x": np.full(3, 2.0)}}, {"n": 2})
        run.wait()
        assert not (tmp_path / "c" / "1").exists()
        np.testing.assert_array_equal(reader.read("state")["x"], np.full(3, 2.0))
        assert (reader.step, reader.about()) == (2, {"n": 2})


def test_of_a_folder_that_was_removed_nothing_is_said_to_be_left(tmp_path, monkeypatch):
    run = Checkpoints(tmp_path / "c", writes=True)
    run.save(1, {"state": {"x": np.ones(3)}}, {})
    run.wait()
    shutil.rmtree(tmp_path / "c")

    def fails(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(run._manager, "save", fails)
    with pytest.raises(WriteError, match=r"step 2 could not be written: .*c is gone") as error:
        run.save(2, {"state": {"x": np.ones(3)}}, {})
    assert "step 1" not in str(error.value)


def test_weights_are_not_used_with_other_anchors(tmp_path):
    """Weights trained with centres on corners lose AP with centres in the middle, silently."""
    saved(tmp_path / "checkpoints", [5])
    assert changes_since(tmp_path, Experiment(train=Train(lr=0.5))) == ["train.lr: 0.01, now 0.5"]
    middle = Experiment(detector=Detector(priors=SquareAnchors(center_offset=0.5)))
    with pytest.raises(ValueError, match=r"center_offset=0\.0.*center_offset=0\.5"):
        changes_since(tmp_path, middle)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.step is None
    for read in (checkpoints.about, lambda: checkpoints.restore(state_of().items())):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "c")):
            read()


def test_find_prefers_the_best_then_the_newest_of_a_work_directory(tmp_path):
    saved(tmp_path / "checkpoints", [4, 6])
    assert Checkpoints.find(tmp_path).folder == tmp_path / "checkpoints"
    assert Checkpoints.find(tmp_path).step == 6
    (tmp_path / "best").mkdir()  # as a run leaves it before its first evaluation
    assert Checkpoints.find(tmp_path).step == 6
    saved(tmp_path / "best", [2])
    assert Checkpoints.find(tmp_path).step == 2
    assert Checkpoints.find(tmp_path / "checkpoints").step == 6
    assert Checkpoints.find(tmp_path / "best").step == 2
    assert Checkpoints.find(Path(os.path.relpath(tmp_path / "best"))).step == 2


@pytest.mark.parametrize("fault", ["RESOURCE_EXHAUSTED: No space left on device", "no path"])
def test_only_errors_of_the_storage_are_blamed_on_it(tmp_path, monkeypatch, fault):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"state": {"x": np.ones(3)}}, {})
    checkpoints.wait()

    def fails(*_, **__):
        raise ValueError(fault)

    monkeypatch.setattr(checkpoints._manager, "save", fails)
    expected = OSError if fault.startswith("RES") else ValueError
    with pytest.raises(expected) as error:
        checkpoints.save(2, {"state": {"x": np.ones(3)}}, {})
    assert fault in str(error.value)
    if expected is OSError:
        assert "of step 2 could not be written" in str(error.value)
        assert "still has the one of step 1" in str(error.value)
    else:
        assert str(error.value) == fault
    checkpoints.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = saved(tmp_path / "c", [5])
    for file in (folder / "5" / "weights" / "d").iterdir():
        file.write_bytes(b"not what was written")
    with pytest.raises(ValueError, match=r"c/5 is damaged"):
        restored(folder, state_of())


def test_find_names_a_folder_without_checkpoints(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=str(folder)):
            Checkpoints.find(folder)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_an_experiment_survives_json(file):
    experiment = load_experiment(file)
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_all_rows_of_a_table_survive_json(file):
    for row in load_rows(file).values():
        found = from_dict(Experiment, json.loads(json.dumps(to_dict(row.experiment))))
        assert found == row.experiment


def test_fields_that_are_absent_take_their_defaults():
    assert from_dict(Experiment, {"kind": "Experiment"}) == Experiment()
    changed = {"kind": "Train", "milestones": [3, 4]}
    found = from_dict(Experiment, {"kind": "Experiment", "train": changed})
    assert found == Experiment(train=Train(milestones=(3, 4)))


def test_a_field_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="Train has no field learning_rate"):
        changed = {"kind": "Train", "learning_rate": 0.1}
        from_dict(Experiment, {"kind": "Experiment", "train": changed})


def test_an_error_does_not_leave_a_save_half_done(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"state": {"x": np.zeros(1 << 23)}}, {})
        raise ZeroDivisionError
    assert [child.name for child in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert Checkpoints.find(tmp_path).step == 1
