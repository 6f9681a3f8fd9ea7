"""Finds the cases computed with the PyTorch reference and prints how far we are from them.

A case is an .npz with `meta` (JSON), known by its content: its file name does not matter.
"""

import gc
from pathlib import Path

import jax
import numpy as np
import pytest
from detector_case import DetectorCase, read_meta

KINDS = {"detector_case": "model", "loss_case": "cases", "pipeline_case": "rules"}
"""Fixture of a kind of case, and the entry of `meta` by which it is known."""

TABLE: list[tuple[str, str, float, float]] = []


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--reference-dir"))
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise pytest.UsageError(f"--reference-dir {folder} holds no .npz files")
    for fixture, entry in KINDS.items():
        if fixture in metafunc.fixturenames:
            found = [file for file in files if entry in read_meta(file)]
            ids = [file.stem for file in found]
            # Backward passes of whole networks take long: by default one detector's gradients.
            name = metafunc.function.__name__
            found = [
                pytest.param(file, marks=pytest.mark.slow)
                if name == "test_trajectory"
                or (name == "test_gradients" and read_meta(file)["model"]["type"] != "GFL")
                else file
                for file in found
            ]
            metafunc.parametrize(fixture, found, ids=ids, indirect=True, scope="module")


def pytest_terminal_summary(terminalreporter):
    if not TABLE:
        return
    largest: dict[tuple[str, str], tuple[float, float]] = {}
    for case, quantity, difference, tolerance in TABLE:
        key = case, quantity.split(".")[0] if quantity.startswith("grad.") else quantity
        largest[key] = max(largest.get(key, (-1.0, 1.0)), (difference, tolerance))
    terminalreporter.section("largest differences from the reference")
    terminalreporter.write_line(f"{'case':<24}{'quantity':<28}{'difference':>12}{'tolerance':>12}")
    for (case, quantity), (difference, tolerance) in largest.items():
        allowed = f"{tolerance:.0e}" if np.isfinite(tolerance) else "at margins"
        terminalreporter.write_line(f"{case:<24}{quantity:<28}{difference:>12.1e}{allowed:>12}")


@pytest.fixture
def compare(request):
    """compare(quantity, ours, theirs, tolerance): relative to the largest value of `theirs`."""

    def compare(quantity, ours, theirs, tolerance, *, scale=None):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape, f"{quantity}: {ours.shape} instead of {theirs.shape}"
        scale = np.abs(theirs).max(initial=0) if scale is None else scale
        difference = np.max(np.abs(ours - theirs) / np.maximum(scale, 1e-12), initial=0)
        record(quantity, difference, tolerance)

    def record(quantity, difference, tolerance):
        (file,) = (v for v in request.node.callspec.params.values() if isinstance(v, Path))
        TABLE.append((file.stem, quantity, float(difference), tolerance))
        assert difference <= tolerance, f"{quantity}: {difference:.2e} > {tolerance:.0e}"

    compare.record = record
    return compare


@pytest.fixture(scope="module")
def detector_case(request):
    yield DetectorCase(request.param)
    gc.collect()
    jax.clear_caches()  # several of these networks at once would take gigabytes


@pytest.fixture(scope="module")
def loss_case(request):
    return np.load(request.param)


@pytest.fixture(scope="module")
def pipeline_case(request):
    return np.load(request.param)
