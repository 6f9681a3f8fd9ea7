"""What `import gfl_jax` gives, what it needs, and what the package says of itself."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gfl_jax
from gfl_jax import losses

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

BLOCKED = """
import sys

class Only:
    '''Refuses what jax and jaxtyping do not bring along.'''

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Only())
"""


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_losses_need_jax_and_jaxtyping_alone(tmp_path):
    needed = {"jax", "jaxtyping", "numpy", "scipy", "ml-dtypes"}
    names = {"opencv-python-headless": "cv2", "tensorflow-datasets": "tensorflow_datasets"}
    names |= {"orbax-checkpoint": "orbax", "importlib-resources": "importlib_resources"}
    required = [d.partition(">")[0] for d in PROJECT["project"]["dependencies"]]
    blocked = {
        names.get(name, name.partition("[")[0].replace("-", "_"))
        for name in [*required, "matplotlib", "tensorboardX", "huggingface-hub", "torch"]
        if name not in needed
    }
    assert {"cv2", "tyro", "etils", "flax", "matplotlib"} <= blocked
    code = BLOCKED.format(blocked=blocked) + (
        "import gfl_jax.losses\n"
        "assert float(gfl_jax.quality_focal_loss(0.0, 1.0)) > 0\n"
        "from gfl_jax import *\n"
        "try:\n    gfl_jax.Experiment\n"
        "except ModuleNotFoundError as error:\n    print('blocked', error)\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("blocked ")


def test_importing_the_package_or_its_front_door_imports_no_jax(tmp_path):
    code = (
        "import gfl_jax, gfl_jax.__main__\nassert not {'jax', 'tyro', 'numpy'} & set(sys.modules)"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_all_losses_are_at_the_top():
    functions = {
        name
        for name, value in vars(losses).items()
        if name.endswith("_loss") and inspect.isfunction(value)
    }
    assert functions == set(gfl_jax._LOSSES)
    for name in functions:
        assert getattr(gfl_jax, name) is getattr(losses, name)
        assert name in dir(gfl_jax)


def test_what_else_is_at_the_top():
    from gfl_jax.config import Experiment
    from gfl_jax.run import load

    assert gfl_jax.Experiment is Experiment
    assert gfl_jax.load is load
    assert not hasattr(gfl_jax, "no_such_name")


def test_the_requirements_are_those_of_the_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    extras = PROJECT["project"]["optional-dependencies"]
    expected = [*PROJECT["project"]["dependencies"]]
    for extra in ("plotting", "tensorboard", "hub"):
        expected += extras[extra]
    assert sorted(line for line in lines if line and not line.startswith("#")) == sorted(expected)


def test_every_folder_of_the_package_is_in_the_wheel():
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "gfl_jax").rglob("*.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"gfl_jax.configs"}


def test_the_version_is_that_of_changelog_and_citation():
    assert f"## [{gfl_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {gfl_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_extras_that_messages_name_exist():
    extras = set(PROJECT["project"]["optional-dependencies"])
    for file in (ROOT / "gfl_jax").rglob("*.py"):
        text = file.read_text()
        named = re.split(r"needs\(\"|gfl-jax\[|install '\.\[", text)[1:]
        for rest in named if file.name != "errors.py" else []:
            assert rest.partition('"')[0].partition("]")[0] in extras, file
