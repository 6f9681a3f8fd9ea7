"""The model card of a trained detector: what is known about it, and nothing else."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from gfl_jax.config import to_dict
from gfl_jax.errors import needs
from gfl_jax.run import Run

PAPER = """@inproceedings{li2020generalized,
  title     = {Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense
               Object Detection},
  author    = {Li, Xiang and Wang, Wenhai and Wu, Lijun and Chen, Shuo and Hu, Xiaolin and Li, Jun
               and Tang, Jinhui and Yang, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}"""

UNKNOWN = "not recorded"


class Licence(NamedTuple):
    """What others may do with the weights.

    Attributes:
        id: as the hub spells it, such as apache-2.0; 'other' for one that it does not know.
        name: of another one.
        link: to its text.
    """

    id: str
    name: str = ""
    link: str = ""


class Measured(NamedTuple):
    """How good the detector is.

    Attributes:
        metrics: COCO's, by their names; those without objects are -1.
        intervals: of AP, AP50 and AP75: value, low and high end; empty if there are none.
        classes: (name, objects, AP) of each class; empty if only the training measured it.
        images: that were evaluated; 0: unknown.
        note: how it was measured, as sentences.
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float, float]]
    classes: list[tuple[str, int, float]]
    images: int
    note: str


def without_paths(value: Any) -> Any:
    """JSON in which a path of this machine or of a bucket is cut to its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and ("://" in value or PurePath(value).is_absolute()):
        return PurePath(value).name
    return value


def changed(value: Any) -> str:
    """A config value as Python writes it, without the fields that have their defaults."""
    if not dataclasses.is_dataclass(value):
        return repr(without_paths(value))
    named = ", ".join(
        f"{field.name}={changed(inner)}"
        for field in dataclasses.fields(value)
        if (inner := getattr(value, field.name)) != field.default
    )
    return f"{type(value).__name__}({named})"


def data_name(run: Run) -> str:
    """What the data is called: by tfds, or its folder; else the kind of its source."""
    source = to_dict(run.experiment.data.source)
    named = next((source[key] for key in ("name", "prepared", "root") if source.get(key)), "")
    return (named if "name" in source else PurePath(named).name) or source["kind"].lower()


def card(
    run: Run, name: str, data: str, licence: Licence, measured: Measured | None, location: str
) -> str:
    """The text of README.md.

    Args:
        run: the detector.
        name: its title.
        data: the name of the data.
        licence: of the weights.
        measured: how good it is; None: not measured.
        location: what `gfl_jax.load` takes.

    Raises:
        MissingExtraError: huggingface-hub is not installed, which writes the metadata.
    """
    sections = {
        "Use": _use(location),
        "Results": _results(run, measured, data),
        "Data": _data(run, data, measured),
        "Training": _training(run),
        "What it can and cannot do": _limits(run, measured),
        "Citation": f"```bibtex\n{PAPER}\n```",
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    metadata = _metadata(run, name, data, licence, measured)
    return f"---\n{metadata}\n---\n\n# {name}\n\n{_summary(run, data)}\n\n{text}\n"


def _metadata(run: Run, name: str, data: str, licence: Licence, measured: Measured | None) -> str:
    """YAML as the hub reads it."""
    with needs("hub"):
        from huggingface_hub import EvalResult, ModelCardData
    metrics = measured.metrics if measured else {}
    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type=data.lower().replace(" ", "-"),
            dataset_name=data,
            dataset_split="validation",
            metric_type=metric.lower(),
            metric_name=metric,
            metric_value=round(metrics[metric], 4),
        )
        for metric in ("AP", "AP50", "AP75")
        if metrics.get(metric, -1) >= 0
    ]
    tags = ["object-detection", "generalized-focal-loss", "jax", "flax", "arxiv:2006.04388"]
    return ModelCardData(
        license=licence.id,
        license_name=licence.name or None,
        license_link=licence.link or None,
        library_name="gfl-jax",
        pipeline_tag="object-detection",
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _summary(run: Run, data: str) -> str:
    names = run.category_names
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    variables = run.variables
    count = sum(x.size for part in (variables.params, variables.frozen) for x in part.values())
    verb = "trained on" if run.step else "for the classes of"
    return (
        f"An object detector {verb} {data}: {len(names)} classes ({listed}), "
        f"{count / 1e6:.1f} million parameters. Trained and used with gfl_jax, "
        "[Generalized Focal Loss](https://arxiv.org/abs/2006.04388) in JAX."
    )


def _use(location: str) -> str:
    return (
        f"With gfl_jax installed{' (and its extra `hub`)' if location.startswith('hf://') else ''}"
        ":\n\n```python\nimport gfl_jax\n"
        f'detections = gfl_jax.load("{location}")("street.jpg")\n```\n\n'
        "`detections.boxes`, `.scores` and `.names` are in pixels of the image; "
        '`detections.plot().save("out.png")` draws them.'
    )


def _results(run: Run, measured: Measured | None, data: str) -> str:
    if measured is None:
        return "Not measured: no result of an evaluation is stored with these weights."
    rows = []
    for metric, value in measured.metrics.items():
        if value >= 0:
            _, low, high = measured.intervals.get(metric, (0, 0, 0))
            interval = f"{low:.3f} to {high:.3f}" if metric in measured.intervals else ""
            rows.append((metric, f"{value:.3f}", interval))
    text = f"{_table(('COCO metric', data, '95% interval'), rows)}\n\n{measured.note}"
    rows = [
        (name, str(objects), f"{ap:.3f}" if ap >= 0 else "no objects")
        for name, objects, ap in measured.classes
    ]
    return text + (f"\n\n{_table(('class', 'objects', 'AP'), rows)}" if rows else "")


def _data(run: Run, data: str, measured: Measured | None) -> str:
    made = run.about.get("made_with", {})
    rows = [("name", data), ("source", f"`{changed(run.experiment.data.source)}`")]
    for split, word in (("train", "training"), ("val", "validation")):
        images, objects = (made.get(what, {}).get(split) for what in ("images", "objects"))
        known = f"{images} images, {objects} objects" if images is not None else UNKNOWN
        if images is None and split == "val" and measured and measured.images:
            known = f"{measured.images} images"
        key = run.about.get("data", {}).get(split)
        rows.append((word, known + (f" (key `{key}`)" if key else "")))
    rows.append(("classes", ", ".join(run.category_names)))
    return _table(("", ""), rows)


def _training(run: Run) -> str:
    experiment, made = run.experiment, run.about.get("made_with", {})
    train, data = experiment.train, experiment.data
    detector = f"`{changed(experiment.detector)}`"
    rows = [("network", f"`{changed(experiment.model)}`"), ("detector", detector)]
    if not run.step:
        said = "These weights come from a file of another program: how they were trained is "
        return f"{said}{UNKNOWN}.\n\n{_table(('', ''), rows)}"
    begins = experiment.model.init_from or experiment.model.pretrained
    ema = f", moving average {train.ema_decay:g}" if train.ema_decay else ""
    clip = f", gradients clipped at norm {train.clip_norm:g}" if train.clip_norm else ""
    low, high = data.multi_scale or (data.scale[1], data.scale[1])
    short = f"{high}" if low == high else f"{low} to {high}"
    packages = {"gfl_jax": run.about.get("gfl_jax"), **made.get("packages", {})}
    versions = ", ".join(f"{package} {v}" for package, v in packages.items() if v)
    device = f"{made['devices']} x {made['device']}" if "device" in made else UNKNOWN
    per_epoch = run.about.get("steps_per_epoch")
    epochs = f" (epoch {run.step / per_epoch:.4g} of {train.epochs})" if per_epoch else ""
    rows += [
        ("begun with", without_paths(begins) or "random weights"),
        ("steps", f"{run.step}{epochs}, batches of {train.batch_size} images"),
        (
            "optimiser",
            f"SGD, momentum {train.momentum:g}, weight decay {train.weight_decay:g}{clip}{ema}",
        ),
        (
            "learning rate",
            f"{train.lr * train.batch_size / 16:g}, {train.warmup} warm-up of at most "
            f"{train.warmup_steps} steps, "
            f"a tenth after epochs {', '.join(map(str, train.milestones)) or 'none'}",
        ),
        (
            "images",
            f"long side at most {data.scale[0]}, short side at most {short} pixels"
            if data.keep_ratio
            else f"stretched to {data.scale[0]} x {data.scale[1]} pixels",
        ),
        ("augmentation", f"{data.augmentation}, horizontal flips with probability {data.flip:g}"),
        ("arithmetic", f"convolutions in {experiment.model.dtype}"),
        ("seed", str(train.seed)),
        ("versions", versions or UNKNOWN),
        ("commit", made.get("git") or UNKNOWN),
        ("devices", device),
        ("date", made.get("date", UNKNOWN)),
    ]
    return _table(("", ""), rows) + "\n\nAll fields are in `config.json`."


def _limits(run: Run, measured: Measured | None) -> str:
    detector, data = run.experiment.detector, run.experiment.data.for_evaluation()
    rule = detector.inference
    size = f"{data.scale[0]} x {data.scale[1]} pixels"
    lines = [
        f"It detects the {len(run.category_names)} classes above and no others.",
        f"Images are resized to {'fit ' if data.keep_ratio else ''}{size} first: what is not "
        "visible then is not found.",
        f"It returns at most {rule.max_per_image} detections an image, with scores of at least "
        f"{rule.score_threshold:g}.",
    ]
    if measured:
        rated = [entry for entry in measured.classes if entry[2] >= 0]
        if len(rated) > 1:
            worst = min(rated, key=lambda entry: entry[2])
            lines.append(f"The class with the lowest AP is {worst[0]}: {worst[2]:.3f}.")
        sizes = {"APS": "small", "APM": "medium", "APL": "large"}
        if none := [word for key, word in sizes.items() if measured.metrics.get(key, 0) < 0]:
            lines.append(f"The evaluation had no {' and no '.join(none)} objects (as COCO says).")
        lines.append("It was measured on the images above only: what it does on others is unknown.")
    else:
        lines.append("How good it is has not been measured.")
    if run.temperature != 1:
        lines.append(
            f"Distributions of sides are corrected by the temperature {run.temperature:.3g} "
            "(`gfl-jax calibrate`)."
        )
    lines.append("No other use than detecting these objects was tested.")
    return "\n".join(f"* {line}" for line in lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in cells)
