"""Three training steps over some devices of some processes, and how far their parameters differ.

    python tests/compare_devices.py            # prints the table of docs/scaling.md

As a program with arguments it is one process of these: VARIANT, INDEX, PORT, file to write.
"""

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    # Before anything imports jax: as many devices as this process has of the variant's.
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    local = int(sys.argv[5]) if len(sys.argv) > 1 else 1
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={local} --xla_backend_optimization_level=0"
    )

import jax
import numpy as np
from tiny_experiment import make_batch

from gfl_jax.config import Train
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.distributed import REPLICATED, SHARDED, parallel
from gfl_jax.hosts import Hosts, join
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.training.evaluator import make_predict
from gfl_jax.training.step import init_state, learning_rate, make_train_step, sgd

CLASSES = 3
OBJECTS = [3, 0, 1, 8, 2, 0, 5, 1]
# Random weights score about 0.01 everywhere and predict the same box: all of them are kept.
DETECTOR = Detector(
    inference=Inference(score_threshold=1e-6, nms_iou=1.0, nms_pre=50, max_per_image=30)
)
# Clipped, averaged, decayed: all that a step does with a gradient.
TRAIN = Train(batch_size=8, lr=0.1, warmup_steps=0, clip_norm=2.0, ema_decay=0.5, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a batch of eight images is computed."""

    processes: int = 1
    devices: int = 1
    mapping: str = "pmap"
    accumulate: int = 1
    norm: str = "frozen_bn"
    remat: bool = False


VARIANTS = {
    "1 device": Variant(),
    "1 device, 2 parts": Variant(accumulate=2),
    "1 device, 8 parts": Variant(accumulate=8),
    "1 device, remat": Variant(remat=True),
    "8 devices, pmap": Variant(1, 8, "pmap"),
    "8 devices, shard_map": Variant(1, 8, "shard_map"),
    "2 devices, 4 parts, pmap": Variant(1, 2, "pmap", 4),
    "2 devices, 4 parts, shard_map": Variant(1, 2, "shard_map", 4),
    "2 processes x 4 devices, pmap": Variant(2, 4, "pmap"),
    "2 processes x 4 devices, shard_map": Variant(2, 4, "shard_map"),
    "BatchNorm, 1 device": Variant(norm="bn"),
    "synchronised BatchNorm, 8 devices, pmap": Variant(1, 8, "pmap", norm="sync_bn"),
    "synchronised BatchNorm, 8 devices, shard_map": Variant(1, 8, "shard_map", norm="sync_bn"),
    "synchronised BatchNorm, 2 x 4, shard_map": Variant(2, 4, "shard_map", norm="sync_bn"),
}


def make_network(norm: str = "frozen_bn", remat: bool = False) -> Network:
    """A small ResNet-FPN-GFL."""
    frozen = 1 if norm == "frozen_bn" else -1
    backbone = Backbone(depth=18, width=8, norm=norm, frozen_stages=frozen, remat=remat)
    model = Model(backbone, Neck(32), Head(width=32, stacked_convs=1))
    return Network(model, DETECTOR.predicts(CLASSES))


def make_batches() -> list:
    """Three batches of eight images, some without objects, one slot in each only a filler."""
    mask = np.arange(8) != 5
    return [make_batch(np.roll(OBJECTS, i), seed=i)._replace(image_mask=mask) for i in range(3)]


class Trainer:
    """A network, its compiled step and predictions over some devices."""

    def __init__(self, network, devices, detector=DETECTOR, train=TRAIN):
        schedule = learning_rate(train, steps_per_epoch=100)
        optimizer = sgd(train, schedule)
        step = make_train_step(network, detector, optimizer, schedule, train)
        self.devices = devices
        self.step = devices.map(step, outputs=(REPLICATED, REPLICATED, SHARDED), donate=True)
        self.predict = devices.map(make_predict(network, detector), outputs=SHARDED)
        first = init_state(network.init(0), optimizer, train)
        self.first = jax.tree.map(lambda x: np.array(x, copy=True), first)

    def own(self, batch):
        """This process's part of a batch, on its devices."""
        index, count = self.devices.share
        size = len(batch.images) // count
        return self.devices.shard(
            jax.tree.map(lambda x: x[index * size : (index + 1) * size], batch)
        )

    def run(self, batches):
        """The state after these steps, on the devices, and what each step reported."""
        state, reports = self.devices.replicate(self.first), []
        for batch in batches:
            state, scalars, per_image = self.step(state, self.own(batch))
            reports.append(
                (
                    self.devices.fetch_replicated(scalars),
                    self.devices.fetch_sharded(per_image),
                )
            )
        return state, reports


def difference(a, b, first):
    """The largest difference of a parameter, relative to how far training moved its tensor."""
    worst = 0.0
    for name in a:
        moved, apart = np.abs(a[name] - first[name]).max(), np.abs(a[name] - b[name]).max()
        worst = max(worst, float(apart / moved) if moved else float(apart > 0))
    return worst


def params_of(trainer, state):
    """The parameters on the host."""
    return trainer.devices.fetch_replicated(state.variables.params)


def parameters(variant: Variant) -> tuple[dict, dict]:
    """The parameters before and after three steps, by as many processes as it says."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, __file__, repr(variant)]
        files = [Path(folder) / f"{i}.npz" for i in range(variant.processes)]
        processes = [
            subprocess.Popen(
                [*command, str(i), str(port), str(file), str(variant.devices)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i, file in enumerate(files)
        ]
        for process in processes:
            printed, _ = process.communicate(timeout=300)
            assert process.returncode == 0, printed
        loaded = [{k: np.array(v) for k, v in np.load(file).items()} for file in files]
    for other in loaded[1:]:
        for name, value in loaded[0].items():
            np.testing.assert_array_equal(other[name], value)
    parts = ("first/", "last/")
    first, last = (
        {k.removeprefix(part): v for k, v in loaded[0].items() if k.startswith(part)}
        for part in parts
    )
    return first, last


def main() -> None:
    """One process, or the table."""
    if len(sys.argv) > 1:
        variant = eval(sys.argv[1])
        if variant.processes > 1:
            address = f"localhost:{sys.argv[3]}"
            join(Hosts(coordinator=address, count=variant.processes, index=int(sys.argv[2])))
        train = dataclasses.replace(TRAIN, accumulate=variant.accumulate)
        trainer = Trainer(
            make_network(variant.norm, variant.remat), parallel(variant.mapping), train=train
        )
        state, _ = trainer.run(make_batches())
        found = {"first": trainer.first.variables.params, "last": params_of(trainer, state)}
        np.savez(
            sys.argv[4],
            **{f"{part}/{k}": v for part, arrays in found.items() for k, v in arrays.items()},
        )
        return
    print("| computed by | largest difference of a parameter / its tensor's largest change |")
    print("|---|---|")
    for name, variant in VARIANTS.items():
        first, last = parameters(variant)
        if variant.devices * variant.processes * variant.accumulate == 1 and not variant.remat:
            expected = last
            print(f"| {name} | the reference |", flush=True)
        else:
            print(f"| {name} | {difference(expected, last, first):.1e} |", flush=True)


if __name__ == "__main__":
    main()
