"""The built wheel in an environment of its own, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tiny_experiment import CONFIG

import gfl_jax
from gfl_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy without what git ignores."""
    folder = tmp_path_factory.mktemp("wheel")
    kept = ("gfl_jax", "configs", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
    for name in kept:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    # With the setuptools that is installed: nothing is downloaded.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, folder / "source"], check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


class Installed:
    """A new environment with the wheel; its dependencies are those of this one."""

    def __init__(self, wheel, folder):
        self.folder = folder
        python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        packages = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
        command = [*pip, "--ignore-installed", wheel]
        subprocess.run(command, check=True, capture_output=True)
        self.packages = Path(packages)

    def python(self, code):
        return self._run("python", "-c", code)

    def __call__(self, *arguments):
        """Runs gfl-jax in an empty folder."""
        return self._run("gfl-jax", *arguments)

    def _run(self, program, *arguments):
        (self.folder / "empty").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        done = subprocess.run(
            [self.folder / "venv" / "bin" / program, *map(str, arguments)],
            cwd=self.folder / "empty",
            env=kept | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_has_the_package_its_configs_and_its_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [file for file in (ROOT / "gfl_jax").rglob("*.*") if "__pycache__" not in file.parts]
    for file in [*files, *(ROOT / "configs").glob("*.py")]:
        name = file.relative_to(ROOT).as_posix()
        assert name in names or f"gfl_jax/{name}" in names
    assert "gfl_jax/py.typed" in names
    assert {Path(name).name for name in names if "dist-info/licenses/" in name} == {
        "LICENSE",
        "NOTICE",
    }
    assert {name.partition("/")[0] for name in names} == {
        "gfl_jax",
        f"gfl_jax-{gfl_jax.__version__}.dist-info",
    }


def test_it_is_the_wheel_that_runs(installed):
    printed = installed.python("import gfl_jax; print(gfl_jax.__file__)")
    assert Path(printed.strip()).is_relative_to(installed.packages)
    assert installed("--version") == f"gfl-jax {gfl_jax.__version__}\n"


def test_commands_and_configs_are_found_in_an_empty_folder(installed):
    listed = installed("--help")
    for command in COMMANDS:
        assert f"\n  {command} " in listed
    assert "--detector.assigner" in installed("train", "gfl_r50_fpn_1x_coco", "--help")
    assert "--detector.assigner" in installed("train", "table_1a:fcos_joint", "--help")
    rows = installed("tables", "3", "--list")
    assert [line.split()[0] for line in rows.splitlines()] == [
        "table",
        "neither",
        "qfl",
        "dfl",
        "qfl_dfl",
    ]


def test_what_programs_start_as_a_file_is_there(installed):
    printed = installed.python(
        "from gfl_jax.interop import crosscheck, mmdet_stages\n"
        "print(crosscheck.TORCH_GFL.is_file(), mmdet_stages.__file__)"
    )
    assert printed.startswith("True ")


def test_a_detector_is_trained_evaluated_and_loaded_in_an_empty_folder(installed):
    (installed.folder / "tiny.py").write_text(CONFIG)
    cache = f"--data.cache-dir={installed.folder / 'cache'}"
    short = ["--train.epochs=1", "--train.milestones", "1", "--train.batch-size=11"]
    fields = [*short, "--data.workers=1", "--workdir=run", cache]  # 22 images: two steps
    printed = installed("train", installed.folder / "tiny.py", *fields)
    assert "2 in all" in printed
    run = installed.folder / "empty" / "run"
    assert (run / "detections.png").is_file()
    assert (run / "curves.png").is_file()
    assert "step 2 of" in installed("eval", "run", "--limit=4")
    printed = installed.python("import gfl_jax; print(gfl_jax.load('run').step)")
    assert printed.splitlines()[-1] == "2"
