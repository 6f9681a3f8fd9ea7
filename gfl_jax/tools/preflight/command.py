"""Will it fit, how fast could it be, which batch? Compiles for TPUs on a machine without one.

    gfl-jax preflight configs/gfl_r50_fpn_1x_coco.py --topology v5e:4x4
        [--per-device-batch 2 4 8] [--mapping shard_map] [--canvas 800 1344] [--out report.md]
        [--any.field VALUE]

Compiles the whole train step and the predictions with the compiler that real TPUs use
(`pip install ".[tpu-preflight]"`), and reports the memory of a chip, what is sent between
chips, and an estimate of how long a step takes and where the time goes. Nothing is computed and no
data is opened. A full-size step takes long to compile: gfl_r50's 6 to 10 minutes on one core. Given
several batches, a table says which one is best.
"""

import dataclasses
import json
from typing import Annotated, Literal

import jax
import tyro

from gfl_jax.cli import load_experiment, parse_command, positional
from gfl_jax.config import Experiment
from gfl_jax.data.images import canvases_of
from gfl_jax.data.sources import Data
from gfl_jax.errors import InputError
from gfl_jax.paths import as_path
from gfl_jax.tools.preflight.compile import preflight
from gfl_jax.tools.preflight.report import comparison, markdown, to_json, verdict


@dataclasses.dataclass(frozen=True)
class PreflightCommand:
    """What to compile, and for which slice.

    Attributes:
        config: a config file, or the name of one that comes with gfl_jax.
        experiment: what the config says.
        topology: version of the TPU and chips along each axis of the slice: v5e:1x1, v5e:4x4,
            v4:2x2x1, v5p:2x2x1, v6e:4x4, ...
        per_device_batch: images per chip and step; given several, a table says which is best.
            train.batch_size follows from it; predictions take train.eval_batch.
        mapping: of the step; empty: train.mapping.
        canvas: height and width of the images in pixels; 0 0: the largest canvas of the data,
            landscape.
        gts: number of objects that an image is padded to; COCO has up to 96.
        num_classes: of the data.
        out: Markdown or JSON file; the other is written beside it. Empty: neither.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
    topology: str = "v5e:2x2"
    per_device_batch: tuple[int, ...] = (2,)
    mapping: Literal["", "pmap", "shard_map"] = ""
    canvas: tuple[int, int] = (0, 0)
    gts: int = 100
    num_classes: int = 80
    out: str = ""

    def __post_init__(self):
        if min(self.per_device_batch, default=0) < 1:
            raise InputError(
                f"--per-device-batch is {self.per_device_batch}; give positive numbers of images"
            )
        if self.canvas != (0, 0) and (min(self.canvas) < 32 or any(s % 32 for s in self.canvas)):
            raise InputError(
                f"--canvas is {self.canvas}; give height and width, multiples of 32, or 0 0"
            )
        for field in ("gts", "num_classes"):
            if getattr(self, field) < 1:
                name = field.replace("_", "-")
                raise InputError(f"--{name} is {getattr(self, field)}; it must be positive")


def largest_canvas(data: Data) -> tuple[int, int]:
    """Height and width of the largest canvas of an experiment's batches, landscape, in pixels."""
    if not data.keep_ratio:
        return data.scale[1], data.scale[0]
    sides = canvases_of(data.scale, data.canvases)[-1]
    return min(sides), max(sides)


def main(arguments: list[str]) -> None:
    """Compiles an experiment for a slice and reports.

    Args:
        arguments: the command line: a config file and flags.

    Raises:
        MissingFileError: there is no such config file.
        InputError: an argument has an invalid value.
        SetupError: libtpu is not installed.
    """
    default = PreflightCommand(tyro.MISSING)
    if config := positional(arguments):
        default = PreflightCommand(config, load_experiment(config))
    command = parse_command(default, arguments, "gfl-jax preflight", __doc__)
    experiment = command.experiment
    if command.mapping:
        train = dataclasses.replace(experiment.train, mapping=command.mapping)
        experiment = dataclasses.replace(experiment, train=train)
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for chips
    canvas = command.canvas if any(command.canvas) else largest_canvas(experiment.data)

    results = []
    for result in preflight(
        experiment,
        command.topology,
        command.per_device_batch,
        canvas,
        command.gts,
        command.num_classes,
    ):
        results.append(result)
        print(f"{verdict(result)}\n", flush=True)

    about = (
        f"{command.config} on {command.topology}, {experiment.train.mapping}, canvas "
        f"{canvas[0]} x {canvas[1]}, {experiment.model.dtype}, {command.num_classes} classes, "
        f"{command.gts} objects per image; jax {jax.__version__}"
    )
    table = comparison(results)
    print(table)
    report = "\n\n".join(["# Preflight", about, table, *map(markdown, results)])
    if not command.out:
        print(f"\n{report}")
        return
    out = as_path(command.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"{report}\n")
    values = {"about": about, "jobs": list(map(to_json, results))}
    out.with_suffix(".json").write_text(json.dumps(values, indent=1))
    print(f"\nreport {out.with_suffix('.md')}, all numbers {out.with_suffix('.json')}")


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax preflight, or python -m gfl_jax preflight")
