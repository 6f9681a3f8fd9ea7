"""Eight CPU devices, one compilation cache for the session, and what several tests share."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and run little: a third of the time to compile.
        "--xla_backend_optimization_level=0",
    ]
).strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one test compiled, a program that another test starts doesn't compile again.
    _cache = tempfile.mkdtemp(prefix="gfl_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py and eval.py

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from hypothesis import settings

from gfl_jax.models.heads import Outputs
from gfl_jax.models.network import Backbone, Model, Variables

settings.register_profile("gfl_jax", deadline=None)
settings.load_profile("gfl_jax")

COMPILED = "/jax/core/compile/backend_compile_duration"


def pytest_addoption(parser):
    parser.addoption(
        "--reference-dir",
        default=str(Path(__file__).parent / "reference" / "cases"),
        help="folder of cases computed with the PyTorch reference",
    )
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Frees what a module compiled: thousands of programs would take several gigabytes."""
    yield
    gc.collect()
    jax.clear_caches()


@pytest.fixture
def compilations():
    """A list that grows by one whenever XLA compiles something."""
    events = []

    def listen(event, duration, **_):
        if event == COMPILED:
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


class LinearNetwork:
    """Predicts from the mean colour of each cell; has all that a Network has, compiles at once."""

    def __init__(self, model, predicts):
        self.model = Model(backbone=Backbone(norm="bn", frozen_stages=-1))
        self._outputs = {"cls": predicts.cls, "box": predicts.box}

    def init(self, seed):
        rng = np.random.default_rng(seed)
        params = {}
        for name, features in self._outputs.items():
            params[f"{name}.kernel"] = jnp.asarray(rng.normal(0, 0.3, (3, features)), jnp.float32)
            params[f"{name}.bias"] = jnp.asarray(rng.normal(-1, 0.3, features), jnp.float32)
        return Variables(params, {"gain": jnp.full(3, 1.5)}, {"mean": jnp.zeros(3)})

    def apply(self, variables, images, sizes, *, train):
        arrays = variables.params
        batch, height, width, _ = images.shape
        cells = images.reshape(batch, height // 8, 8, width // 8, 8, 3) / 255 - 0.5
        levels = [cells.mean((2, 4)) * variables.frozen["gain"]]
        for _ in range(4):
            levels.append(levels[-1][:, ::2, ::2])
        outputs = Outputs(
            *(
                [x @ arrays[f"{name}.kernel"] + arrays[f"{name}.bias"] for x in levels]
                for name in self._outputs
            )
        )
        mean = variables.stats["mean"]
        stats = {"mean": 0.9 * mean + 0.1 * levels[0].mean((0, 1, 2)) if train else mean}
        return outputs, stats


@pytest.fixture(scope="session")
def linear_network():
    """The class of a network that compiles at once."""
    return LinearNetwork


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(objects, canvas): noise images with as many random boxes as `objects` says."""
    return tiny_experiment.make_batch
