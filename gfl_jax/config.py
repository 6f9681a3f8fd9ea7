"""The experiment as one frozen value; every field can be changed on the command line."""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from gfl_jax.data.shapes import Shapes
from gfl_jax.detectors.dense import Detector
from gfl_jax.models.network import Model
from gfl_jax.models.ssd import SSDModel


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images and boxes come from and how they reach the network.

    source: 'shapes' (made on the spot), 'coco' (a COCO-format folder) or the name of a tfds dataset
        prepared as array_record, such as 'coco/2017'.
    root: folder of the data set ('coco'), of tfds's data ('coco/2017'), or empty for 'shapes'.
    train_annotations, train_images, val_annotations, val_images: json files and image folders,
        relative to root.  For a tfds dataset val_annotations may name the original json.
    shapes: contents of the 'shapes' data set.
    cache_dir: where prepared data is kept.
    on_error: 'raise' stops at bad input; 'skip' leaves it out, counts it and lists it.
    scale: images are resized keeping their ratio to fit these (long, short) sides, in pixels.
    keep_ratio: False stretches every image to exactly `scale`, as (width, height), multiples of 32.
    multi_scale: smallest and largest short side in training, drawn once a batch; None: one scale.
    canvases: (height, width) of the landscape canvases, small to large, multiples of 32; portrait
        ones are their mirrors. Empty: the one that holds `scale`.
    flip: probability of a horizontal flip in training.
    augmentation: in training; 'flip' is that flip alone, 'ssd' also zooms out, crops and changes
        colours as SSD does.
    repeats: times every image is seen in an epoch of training.
    workers: processes that prepare batches; 0 uses threads of the training process.
    cache_megabytes: memory for resized images ('ssd': originals), in each worker: a small data set
        is decoded once.
    """

    source: str = "coco"
    root: str = ""
    train_annotations: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    val_annotations: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    shapes: Shapes = Shapes()
    cache_dir: str = "~/.cache/gfl_jax"
    on_error: Literal["raise", "skip"] = "raise"
    scale: tuple[int, int] = (1333, 800)
    keep_ratio: bool = True
    multi_scale: tuple[int, int] | None = None
    canvases: tuple[tuple[int, int], ...] = ()
    flip: float = 0.5
    augmentation: Literal["flip", "ssd"] = "flip"
    repeats: int = 1
    workers: int = 4
    cache_megabytes: int = 0

    def __post_init__(self):
        if self.scale[0] < self.scale[1] or self.scale[1] < 32:
            raise ValueError(f"data.scale is {self.scale}; give (long, short) sides, short >= 32")
        if (
            self.multi_scale
            and not 32 <= self.multi_scale[0] <= self.multi_scale[1] <= self.scale[1]
        ):
            raise ValueError(
                f"data.multi_scale is {self.multi_scale}; give (smallest, largest) short sides "
                f"between 32 and {self.scale[1]}, the short side of data.scale"
            )
        for canvas in self.canvases:
            if canvas[0] % 32 or canvas[1] % 32 or canvas[0] > canvas[1]:
                raise ValueError(
                    f"data.canvases has {canvas}; give (height, width) with height <= width, both "
                    "multiples of 32"
                )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}; it is a probability")
        if not self.keep_ratio:
            if self.scale[0] % 32 or self.scale[1] % 32:
                raise ValueError(
                    f"data.scale is {self.scale}; without data.keep_ratio both sides must be "
                    "multiples of 32"
                )
            if self.multi_scale or self.canvases:
                raise ValueError(
                    "data.multi_scale and data.canvases need data.keep_ratio: without it every "
                    "image is stretched to data.scale"
                )
        elif self.augmentation == "ssd":
            raise ValueError("data.augmentation 'ssd' stretches images: set data.keep_ratio False")
        if self.repeats < 1:
            raise ValueError(f"data.repeats is {self.repeats}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Train:
    """The schedule. SGD in PyTorch's form: v = momentum v + g + weight_decay p; p -= lr v.

    batch_size: images a step over all devices.
    lr: for a batch of 16; scaled by batch_size / 16.
    epochs, milestones: length, and epochs after which the rate is multiplied by 0.1.
    warmup_steps, warmup_factor: the rate begins as warmup_factor * lr and, in this many steps,
        rises to lr; linearly, or (warmup 'constant') all at once at their end.
    bias_lr, bias_decay: factors of the rate of convolutions' biases and of the decay of all biases.
    clip_norm: largest norm of the whole gradient; 0 for no clipping.
    ema_decay: of an average of the parameters that is evaluated instead; 0 for none.
    mapping: how the step is laid over devices.
    eval_every: epochs between evaluations, 0 for the last only.
    checkpoint_every: steps between checkpoints, 0 for every epoch.
    log_every: steps between entries of the metrics files.
    seed: of initial weights, batches and augmentation.
    """

    batch_size: int = 16
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 12
    milestones: tuple[int, ...] = (8, 11)
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    warmup: Literal["linear", "constant"] = "linear"
    bias_lr: float = 1.0
    bias_decay: float = 1.0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    mapping: Literal["pmap", "shard_map"] = "pmap"
    eval_every: int = 1
    checkpoint_every: int = 0
    log_every: int = 10
    seed: int = 0

    def __post_init__(self):
        for field in ("batch_size", "epochs", "lr", "log_every"):
            if getattr(self, field) <= 0:
                raise ValueError(f"train.{field} is {getattr(self, field)}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that determines a run."""

    model: Model | SSDModel = Model()
    detector: Detector = Detector()
    data: Data = Data()
    train: Train = Train()


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables.

    title: as the paper calls it.  paper: AP, AP50, AP75, APS, APM, APL on COCO in percent, as far
    as the paper gives them.  note: what the paper leaves open and what was chosen.
    """

    title: str
    experiment: Experiment
    paper: tuple[float, ...] = ()
    note: str = ""


def load_experiment(path: str | Path) -> Experiment:
    """The value named `experiment` of a config file.

    Args:
        path: the file; or FILE.py:ROW, an entry of its dictionary `rows`, as in a table's config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file defines no Experiment of that name.
    """
    file, _, name = str(path).partition(".py:")
    values = _run(Path(f"{file}.py" if name else file))
    if name or ("rows" in values and "experiment" not in values):
        rows = values.get("rows", {})
        if name not in rows:
            raise ValueError(
                f"{file.removesuffix('.py')}.py has the rows {', '.join(rows) or '(none)'}: write "
                f"{file.removesuffix('.py')}.py:ROW with one of them, ROW is {name!r}"
            )
        return rows[name].experiment
    experiment = values.get("experiment")
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path} must define `experiment = Experiment(...)`, found {experiment!r}")
    return experiment


def load_rows(path: str | Path) -> dict[str, Row]:
    """The dictionary named `rows` of a table's config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file defines no rows.
    """
    rows = _run(Path(path)).get("rows")
    if not rows or not all(isinstance(row, Row) for row in rows.values()):
        raise ValueError(f"{path} must define `rows`, a dictionary of names to Row values")
    return rows


def _run(path: Path) -> dict[str, Any]:
    """What a config file defines."""
    if not path.is_file():
        known = ", ".join(sorted(p.as_posix() for p in Path("configs").glob("*.py")))
        raise FileNotFoundError(f"no config file {path}; there are: {known or 'none in configs/'}")
    # A config may import another one of its folder: `from configs.other import experiment`.
    sys.path.insert(0, str(path.resolve().parents[1]))
    try:
        return runpy.run_path(str(path))
    finally:
        sys.path.pop(0)


def to_dict(value: Any) -> Any:
    """A config value as plain JSON: dataclasses as objects with their `kind`, tuples as lists."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [to_dict(item) for item in value] if isinstance(value, tuple | list) else value


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two results of `to_dict`: 'train.lr: 0.01, now 0.02', ..."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        return [
            line
            for field in {**old, **new}
            for line in differences(old.get(field), new.get(field), f"{name}.{field}".strip("."))
        ]
    short = [value.get("kind") if isinstance(value, dict) else value for value in (old, new)]
    return [f"{name}: {short[0]}, now {short[1]}"] if old != new else []


def from_dict(kind: Any, value: Any) -> Any:
    """The inverse of `to_dict`.

    Args:
        kind: the type to build, a dataclass, a union of such or the type of one of their fields.
        value: JSON of it. Fields that are absent take their defaults.

    Raises:
        ValueError: a kind that is not one of these, or a field that the dataclass does not have.
    """
    if isinstance(value, list):
        return tuple(from_dict(None, item) for item in value)
    if not isinstance(value, dict):
        return value
    members = [k for k in get_args(kind) or (kind,) if isinstance(k, type)]
    kinds: dict[str, Any] = {k.__name__: k for k in members if dataclasses.is_dataclass(k)}
    name = value.get("kind")
    if name not in kinds:
        raise ValueError(f"{name!r} is not a kind of {', '.join(kinds)}")
    hints = get_type_hints(kinds[name])
    items = {field: item for field, item in value.items() if field != "kind"}
    if unknown := set(items) - set(hints):
        raise ValueError(f"{name} has no field {', '.join(sorted(unknown))}")
    return kinds[name](**{field: from_dict(hints[field], item) for field, item in items.items()})


@dataclasses.dataclass(frozen=True)
class TrainCommand(Experiment):
    """What train.py takes.

    workdir: where everything of the run is kept; empty: runs/<name of the config>.
    """

    workdir: str = ""


@dataclasses.dataclass(frozen=True)
class EvalCommand(Experiment):
    """What eval.py takes.

    limit: evaluate the first images only; 0 for all.
    out: where results and pictures go; empty: the folder `eval` beside the checkpoints.
    """

    limit: int = 0
    out: str = ""


Command = TypeVar("Command", bound=Experiment)


def parse_fields(
    command: type[Command], experiment: Experiment, arguments: list[str], doc: str | None
) -> tuple[Experiment, Command]:
    """Changes fields of an experiment by `--any.field VALUE`; a mistyped one ends the program.

    Args:
        command: Experiment with further fields.
        experiment: the values to start from.
        arguments: of the command line.
        doc: shown by --help, above all fields.

    Returns:
        The experiment and the whole command.
    """
    fields = {
        field.name: getattr(experiment, field.name) for field in dataclasses.fields(Experiment)
    }
    parsed = tyro.cli(
        command,
        default=command(**fields),
        args=arguments,
        description=doc,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return Experiment(**{name: getattr(parsed, name) for name in fields}), parsed
