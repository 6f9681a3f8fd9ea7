"""Both sides of the benchmarks do the same work, and the benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfl_jax.data.batch import Batch
from gfl_jax.detectors.dense import Detector
from gfl_jax.models.heads import Outputs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def random_images(rng, count, height, width):
    """Outputs of a head and the objects of images that fill the canvas."""
    grids = [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]
    cls = [rng.normal(-2, 1, (count, *grid, 80)).astype(np.float32) for grid in grids]
    box = [rng.normal(0, 1, (count, *grid, 68)).astype(np.float32) for grid in grids]
    size = np.exp(rng.uniform(2, 5, (count, 12, 2)))
    corner = rng.uniform(0, 1, (count, 12, 2)) * [width, height]
    batch = Batch(
        images=np.zeros((count, height, width, 3), np.uint8),
        sizes=np.tile(np.array([[height, width]], np.int32), (count, 1)),
        scales=np.ones((count, 2), np.float32),
        boxes=np.concatenate([corner, corner + size], -1).astype(np.float32),
        labels=rng.integers(0, 80, (count, 12)).astype(np.int32),
        box_mask=np.arange(12) < np.array([[7], [3]]),
        image_mask=np.ones(count, bool),
    )
    return Outputs(cls, box), batch


def test_the_losses_of_both_sides_are_equal(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch_side

    outputs, batch = random_images(np.random.default_rng(0), 2, 128, 192)
    ours = jax.jit(Detector().losses)(
        Outputs(*([jnp.asarray(x) for x in part] for part in outputs)),
        Batch(*map(jnp.asarray, batch)),
    )
    flat = [
        torch.from_numpy(np.concatenate([x.reshape(2, -1, x.shape[-1]) for x in part], 1))
        for part in outputs[:2]
    ]
    centers, strides, counts = torch_side.anchors(128, 192)
    boxes, mask = torch.from_numpy(batch.boxes), torch.from_numpy(batch.box_mask)
    labels = torch.from_numpy(batch.labels).long()
    theirs = torch_side.losses(*flat, centers, strides, counts, boxes, labels, mask)
    assert float(sum(ours.terms.values())) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    small = "--depth 18 --canvas 64 64 --batch 1 --steps 4 --dtype float32 --only train torch"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *small.split(), "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    ours, theirs = map(json.loads, lines)
    assert [ours["kind"], theirs["kind"]] == ["train", "torch"]
    for result in (ours, theirs):
        assert "error" not in result, result
        assert result["images_per_s"] == pytest.approx(1000 / result["ms"])
    assert ours["peak_gib"] > 0.1 and 0 < ours["tflop_per_image"] < 0.1
