"""Config files, fields as flags, and errors without tracebacks."""

import dataclasses
import io
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from gfl_jax import __main__ as front_door
from gfl_jax import errors, systems
from gfl_jax.assign import ATSS, FCOS, MaxIoU
from gfl_jax.cli import (
    CONFIGS,
    find_config,
    load_experiment,
    load_rows,
    parse_command,
    positional,
    run_name,
)
from gfl_jax.config import Experiment, Row, Train
from gfl_jax.detectors.box import Gaussian, GeneralDistribution, SmoothL1
from gfl_jax.detectors.classification import Focal
from gfl_jax.detectors.quality import NoQuality, QualityBranch
from gfl_jax.models.ssd import SSDModel
from gfl_jax.priors import Points, SSDBoxes
from gfl_jax.terminal import plain_errors, write_anything
from gfl_jax.train import TrainCommand

ROOT = Path(__file__).parents[1]

SYSTEMS = {name: value for name, value in vars(systems).items() if isinstance(value, Experiment)}


def parsed(experiment, *flags):
    """The experiment after these flags."""
    command = TrainCommand("config.py", experiment)
    return parse_command(command, ["config.py", *flags], "gfl-jax train", None).experiment


# ------------------------------------------------------------------------------ fields as flags


@pytest.mark.parametrize(
    ("name", "field", "part", "expected"),
    [
        ("gfl", "detector.box.n=8", "box", GeneralDistribution(n=8)),
        ("atss", "detector.quality.measure=iou", "quality", QualityBranch("iou")),
        ("fcos", "detector.assigner.center-radius=2.5", "assigner", FCOS(center_radius=2.5)),
        ("retinanet", "detector.assigner.negative=0.3", "assigner", MaxIoU(negative=0.3)),
        ("foveabox", "detector.box-loss.beta=0.5", "box_loss", SmoothL1(0.5)),
        ("ssd512", "detector.priors.first=0.07", "priors", SSDBoxes(first=0.07)),
    ],
)
def test_fields_of_the_chosen_kind_change_on_the_command_line(name, field, part, expected):
    system = SYSTEMS[name]
    changed = systems.variant(system, detector={part: expected}, train={"epochs": 3})
    assert parsed(system, f"--{field}", "--train.epochs=3") == changed


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_without_flags_an_experiment_stays_as_it_is(system):
    assert parsed(system) == system


def test_ssd_s_width_changes_on_the_command_line():
    changed = systems.variant(systems.ssd512, model={"width": 16})
    assert parsed(systems.ssd512, "--model.width=16") == changed


def test_fields_of_another_kind_are_no_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(systems.ssd512, "--model.backbone.depth=18")
    assert stop.value.code == 2
    assert "--model.backbone.depth" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--detector.assigner", "FCOS"], {"assigner": FCOS()}),
        (["--detector.assigner=FCOS"], {"assigner": FCOS()}),
        (
            ["--detector.assigner", "FCOS", "--detector.assigner.center-radius", "1.5"],
            {"assigner": FCOS(center_radius=1.5)},
        ),
        (
            ["--detector.assigner.center-radius=1.5", "--detector.assigner=FCOS"],
            {"assigner": FCOS(center_radius=1.5)},
        ),
        (["--detector.box_loss", "SmoothL1"], {"box_loss": SmoothL1()}),
        # Neither could be exchanged alone: a joint quality needs soft labels.
        (
            ["--detector.quality", "NoQuality", "--detector.classification", "Focal"],
            {"quality": NoQuality(), "classification": Focal()},
        ),
        (
            ["--detector.priors", "Points", "--detector.box", "Gaussian"],
            {"priors": Points(), "box": Gaussian()},
        ),
    ],
)
def test_a_choice_is_exchanged_by_the_name_of_a_kind(flags, changes):
    assert parsed(systems.gfl, *flags) == systems.variant(systems.gfl, detector=changes)


def test_the_same_kind_named_again_takes_its_defaults():
    system = systems.variant(systems.gfl, detector={"assigner": ATSS(topk=5)})
    assert parsed(system, "--detector.assigner", "ATSS") == systems.gfl


def test_the_model_is_exchanged_as_any_other_choice():
    found = parsed(systems.gfl, "--model", "SSDModel", "--model.width", "16")
    assert found == dataclasses.replace(systems.gfl, model=SSDModel(width=16))


def test_a_kind_that_does_not_exist_lists_those_that_do(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(systems.gfl, "--detector.assigner", "FCO")
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "--detector.assigner" in printed
    for kind in ("ATSS", "MaxIoU", "FCOS", "FoveaBox"):
        assert repr(kind) in printed


def test_a_value_that_cannot_be_is_a_mistake_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(systems.gfl, "--data.flip", "2")
    assert stop.value.code == 2
    assert "data.flip is 2.0; it must be a probability" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Folder:
    """Files.

    Attributes:
        root: where they are.
    """

    root: str = ""


@dataclasses.dataclass(frozen=True)
class Made:
    """Made up.

    Attributes:
        count: how many.
    """

    count: int = 3


@dataclasses.dataclass(frozen=True)
class Named:
    """A named one.

    Attributes:
        title: of it.
    """

    title: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Images.

    Attributes:
        source: where they come from.
        flip: how often they are flipped.
    """

    source: Annotated[Folder | Made | Named, tyro.conf.arg(name="")] = Folder()
    flip: float = 0.5


@dataclasses.dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        name: of it.
        data: its images.
    """

    name: tyro.conf.Positional[str] = "it"
    data: Source = Source()


def test_a_choice_without_a_prefix_has_flags_beside_those_of_its_owner(capsys):
    def parsed(*flags):
        return parse_command(Program(), ["it", *flags], "program", None).data

    assert parsed("--data.root", "here") == Source(Folder("here"))
    assert parsed("--data.source=Made", "--data.count=5", "--data.flip=1") == Source(Made(5), 1.0)
    with pytest.raises(SystemExit):
        parsed("--data.count=5")
    assert parsed("--data.source", "Named", "--data.title", "x") == Source(Named("x"))
    assert parsed("--data.title", "x") == Source(Named("x"))  # no other kind has it
    with pytest.raises(SystemExit) as stop:
        parsed("--data.source", "Named")
    assert stop.value.code == 2
    assert "--data.title" in capsys.readouterr().err


def test_help_stands_beside_the_flag_it_is_about(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_command(Program(), ["--help"], "program", "What it does.")
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "What it does." in printed
    for flag in (
        "--data.source {Folder,Made,Named} where they come from. (default: Folder)",
        "--data.root STR where they are. (default: '')",
        "--data.flip FLOAT how often they are flipped. (default: 0.5)",
    ):
        assert flag in printed


def test_the_positional_argument_comes_first():
    assert positional(["a.py", "--x"]) == "a.py"
    assert positional(["--x", "a.py"]) is None
    assert positional([]) is None
    with pytest.raises(errors.UsageError, match=r"b\.py must come before the flags"):
        parse_command(Program(), ["--data.flip=1", "b.py"], "program", None)


# -------------------------------------------------------------------------------- config files

EXPERIMENT = """
from gfl_jax.config import Experiment, Train
experiment = Experiment(train=Train(epochs=3))
"""
ROWS = """
from gfl_jax.config import Experiment, Row, Train
rows = {
    "short": Row("A short one", Experiment(train=Train(epochs=3)), (38.0, 56.5)),
    "long-0.5": Row("A long one", Experiment(train=Train(epochs=30))),
}
"""


def written(folder, text, name="table.py"):
    (folder / name).write_text(text)
    return folder / name


def test_a_row_of_a_table_is_named_after_the_file(tmp_path):
    file = written(tmp_path, ROWS)
    for row, epochs in (("short", 3), ("long-0.5", 30)):
        expected = Experiment(train=Train(epochs=epochs))
        assert load_experiment(f"{file}:{row}") == expected
        assert load_rows(file)[row].experiment == expected
    assert load_rows(file)["short"] == Row(
        "A short one", Experiment(train=Train(epochs=3)), (38.0, 56.5)
    )


@pytest.mark.parametrize("row", ["", ":long", ":Short"])
def test_a_table_without_that_row_names_those_there_are(tmp_path, row):
    file = written(tmp_path, ROWS)
    with pytest.raises(errors.InputError, match=r"table\.py has the rows short, long-0\.5") as e:
        load_experiment(f"{file}{row}")
    assert repr(row.removeprefix(":")) in str(e.value)


def test_a_row_of_a_file_without_rows_is_an_error(tmp_path):
    file = written(tmp_path, EXPERIMENT)
    assert load_experiment(file) == Experiment(train=Train(epochs=3))
    with pytest.raises(errors.InputError, match=r"table\.py has the rows \(none\)"):
        load_experiment(f"{file}:short")


def test_a_file_may_have_an_experiment_and_rows(tmp_path):
    file = written(tmp_path, ROWS + EXPERIMENT.replace("epochs=3", "epochs=4"))
    assert load_experiment(file).train.epochs == 4
    assert load_experiment(f"{file}:short").train.epochs == 3


@pytest.mark.parametrize("row", ["", ":short"])
def test_a_file_that_is_not_there_is_named(tmp_path, row):
    with pytest.raises(errors.MissingFileError, match=r"no config .*none\.py"):
        load_experiment(f"{tmp_path / 'none.py'}{row}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nTrain(batchsize=8)",
            r"x\.py, line 3 \(Train\(batchsize=8\)\): TypeError: .*'batchsize'",
        ),
        (
            "from configs.none import a",
            r"x\.py, line 2 \(.*\): ModuleNotFoundError: .*configs\.none",
        ),
        ("x = (", r"x\.py, line 2: SyntaxError: '\(' was never closed"),
        ("from other import a", r"other\.py, line 1 \(a = 1 / 0\): ZeroDivisionError"),
        ("Train(batch_size=0)", r"x\.py: .*batch_size"),
    ],
)
def test_a_mistake_in_a_config_names_its_line(tmp_path, text, message):
    (tmp_path / "other.py").write_text("a = 1 / 0")
    (tmp_path / "x.py").write_text(f"from gfl_jax.config import Train\n{text}")
    with pytest.raises(errors.InputError, match=message):
        load_experiment(tmp_path / "x.py")


@pytest.mark.parametrize("text", ["", "rows = {}", "rows = {'a': 1}", EXPERIMENT])
def test_rows_that_are_none_are_an_error(tmp_path, text):
    with pytest.raises(errors.InputError, match=r"table\.py must define `rows`"):
        load_rows(written(tmp_path, text))


def test_a_config_that_comes_with_the_package_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    paths = {
        "gfl_r50_fpn_1x_coco": ROOT / "configs/gfl_r50_fpn_1x_coco.py",
        "table_1a:atss_joint": f"{ROOT}/configs/table_1a.py:atss_joint",
    }
    monkeypatch.chdir(tmp_path)
    for name, path in paths.items():
        assert load_experiment(name) == load_experiment(path)
        assert find_config(name)[0].samefile(find_config(path)[0])
        assert find_config(name)[1] == find_config(path)[1]
        assert run_name(name) == run_name(path)
    assert load_rows("table_3").keys() == {"neither", "qfl", "dfl", "qfl_dfl"}
    assert run_name("table_1a:atss_joint") == "table_1a_atss_joint"
    assert run_name("there/tiny.py:delta_0.5") == "tiny_delta_0.5"


@pytest.mark.parametrize("name", ["gfl_r50_fpn_coco", "configs/gfl_r50_fpn_2x_coco.py"])
def test_an_unknown_config_lists_those_that_are_spelled_alike(name):
    with pytest.raises(errors.MissingFileError) as error:
        load_experiment(name)
    assert name in str(error.value)
    assert "gfl_r50_fpn_1x_coco, " in str(error.value)
    assert "ssd512" not in str(error.value)


def test_a_name_like_no_other_lists_all(tmp_path):
    with pytest.raises(errors.MissingFileError) as error:
        load_experiment("xyz")
    for file in CONFIGS.glob("*.py"):
        assert file.stem in str(error.value)


def test_configs_import_those_beside_them_and_those_of_the_package(tmp_path):
    for folder, epochs in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        text = EXPERIMENT.replace("epochs=3", f"epochs={epochs}")
        written(tmp_path / folder, text, "base.py")
        text = (
            "import dataclasses\n"
            "from configs.base import experiment as base\n"
            "from configs.gfl_r50_fpn_1x_coco import experiment as shipped\n"
            "experiment = dataclasses.replace(shipped, train=base.train)\n"
        )
        written(tmp_path / folder, text, "derived.py")
    shipped = load_experiment("gfl_r50_fpn_1x_coco")
    for folder, epochs in (("a", 3), ("b", 4), ("a", 3)):
        expected = dataclasses.replace(shipped, train=Train(epochs=epochs))
        assert load_experiment(tmp_path / folder / "derived.py") == expected
    assert not [name for name in sys.modules if name == "configs.base"]


@pytest.mark.parametrize("lr", [0.25, 0.5])
def test_a_config_imports_the_file_beside_it_as_any_program_does(tmp_path, lr):
    """Files of the same name in another folder are others."""
    (tmp_path / "base_of_mine.py").write_text(f"LR = {lr}\n")
    (tmp_path / "mine.py").write_text(
        "from base_of_mine import LR\n"
        "from gfl_jax.config import Experiment, Train\n"
        "experiment = Experiment(train=Train(lr=LR))\n"
    )
    path = list(sys.path)
    assert load_experiment(tmp_path / "mine.py").train.lr == lr
    assert sys.path == path
    assert "base_of_mine" not in sys.modules


def test_a_value_that_cannot_be_is_named_with_its_file(tmp_path):
    file = written(tmp_path, EXPERIMENT.replace("epochs=3", "batch_size=0"))
    with pytest.raises(ValueError, match=r"batch_size"):
        load_experiment(file)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("mistake", "status"),
    [
        (errors.InputError, 1),
        (errors.MissingFileError, 1),
        (errors.SetupError, 1),
        (errors.WriteError, 1),
        (errors.UsageError, 2),
    ],
)
def test_what_a_user_can_fix_is_a_message(mistake, status, capsys):
    with pytest.raises(SystemExit) as stop, plain_errors():
        raise mistake("data.flip is 2")
    assert stop.value.code == status
    assert capsys.readouterr().err == "\nerror: data.flip is 2\n"


def test_a_file_that_the_system_cannot_open_is_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, plain_errors():
        (tmp_path / "missing.json").read_bytes()
    assert stop.value.code == 1
    assert str(tmp_path / "missing.json") in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"), plain_errors():
        int("x")
    with pytest.raises(KeyError), plain_errors():
        {}["x"]
    with pytest.raises(RuntimeError), plain_errors():
        raise RuntimeError
    with pytest.raises(OSError, match="a library's"), plain_errors():
        raise OSError("a library's own")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InputError, ValueError),
        (errors.MissingFileError, FileNotFoundError),
        (errors.WriteError, OSError),
        (errors.SetupError, RuntimeError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_a_caller_in_python_catches_what_it_expects(error, kind):
    with pytest.raises(kind, match="the reason"):
        raise error("the reason")
    assert issubclass(error, errors.UserError)


def test_a_missing_extra_is_named():
    with (
        pytest.raises(errors.MissingExtraError, match=r"no_such_module.*gfl-jax\[plotting\]"),
        errors.needs("plotting"),
    ):
        import no_such_module  # noqa: F401


# ------------------------------------------------------------------------------- the front door


def test_names_that_the_terminal_cannot_write_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    write_anything()
    print("猫 0.5", flush=True)
    assert written.getvalue() == b"\\u732b 0.5\n"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(front_door, "_run", interrupted)
    with pytest.raises(SystemExit) as stop:
        front_door.main(["train"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nstopped by Ctrl-C\n"


TWICE = """
import hashlib, os, signal, threading
from gfl_jax.terminal import interrupts_end
interrupts_end()
kill = lambda: os.kill(os.getpid(), signal.SIGINT)
threading.Timer(1.0, kill).start()
threading.Timer(4.0, kill).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # Python's handlers wait for this
"""


@pytest.mark.alone
def test_a_second_interrupt_ends_what_no_handler_could_stop():
    done = program(start=("-c", TWICE))
    assert done.returncode == 130
    assert done.stderr == (
        "\nCtrl-C: stops after what is running now; again: ends without saving\n"
        "\nCtrl-C twice: ended without saving\n"
    )


DROPPED = """
import os, signal, sys, time
import gfl_jax.__main__ as front_door
from gfl_jax.terminal import interrupts_end

class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass  # where Python's handler raises, and nothing catches

def command(*_):
    interrupts_end()
    Interrupted()
    time.sleep(60)
    print("ran to its end")

front_door._run = command
front_door.program("eval")
"""


def test_an_interrupt_that_python_drops_is_raised_again():
    start = time.monotonic()
    done = program(start=("-c", DROPPED))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped by Ctrl-C\n")
    assert time.monotonic() - start < 50


BUSY = """
import threading, time
import gfl_jax.__main__ as front_door

def command(*_):
    threading.Thread(target=time.sleep, args=(60,)).start()  # as a compilation
    raise KeyboardInterrupt

front_door._run = command
front_door.program("eval")
"""


def test_an_interrupted_program_does_not_wait_for_its_threads():
    start = time.monotonic()
    done = program(start=("-c", BUSY))
    assert (done.returncode, done.stderr) == (130, "\nstopped by Ctrl-C\n")
    assert time.monotonic() - start < 50


LOADING = """
import os, signal
import gfl_jax.__main__ as front_door
with front_door._loading():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        import tyro
    except BaseException:
        print("half imported")
"""


def test_an_interrupt_while_modules_are_loaded_is_one_line():
    done = program(start=("-c", LOADING))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped by Ctrl-C\n")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", front_door.COMMANDS)
def test_the_module_of_a_command_run_by_itself_says_how_to_run_it(name):
    module, _ = front_door.COMMANDS[name][0].split(":")
    with pytest.raises(SystemExit, match=rf"python -m gfl_jax {name}$"):
        runpy.run_module(module, run_name="__main__")


def program(*arguments, start=("-m", "gfl_jax")):
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_the_front_door_lists_all_commands():
    done = program("--help")
    assert done.returncode == 0
    from gfl_jax.__main__ import COMMANDS

    for name, (_, text) in COMMANDS.items():
        assert any(line.split()[:1] == [name] and text in line for line in done.stdout.splitlines())


def test_the_version_is_that_of_the_package():
    from gfl_jax import __version__

    assert program("--version").stdout == f"gfl-jax {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--train"]])
def test_without_a_command_it_ends_with_status_2(arguments):
    done = program(*arguments)
    assert done.returncode == 2
    assert "train a detector" in done.stderr
    assert ("did you mean train?" in done.stderr) == bool(arguments)
