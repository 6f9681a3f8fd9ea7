"""Uploads a trained detector to the Hugging Face hub, with a model card written from its run.

TARGET is OWNER/NAME; or a folder, which begins with ./ or / and gets the same files. What was
pushed is opened by `gfl_jax.load("hf://OWNER/NAME")`. Fields of RUN's data are flags.
"""

import dataclasses
import json
import re
import tempfile
from typing import Annotated, Any

import tyro
from etils import epath

from gfl_jax.cli import parse_command, positional
from gfl_jax.coco_eval import METRICS
from gfl_jax.data.sources import Data
from gfl_jax.errors import InputError, UsageError, UserError, needs
from gfl_jax.interop.exported import CONFIG, WEIGHTS, check_hub, to_hub, write_exported
from gfl_jax.paths import as_path, write
from gfl_jax.run import Run, exported_about, load
from gfl_jax.tools.card import Licence, Measured, card, data_name, without_paths
from gfl_jax.tools.report.bootstrap import intervals, matched
from gfl_jax.tools.report.detections import annotations_of, open_images, predicted, stored
from gfl_jax.tools.report.numbers import Numbers, numbers_of
from gfl_jax.training.metrics import read_metrics
from gfl_jax.training.start import key_of

CARD = "README.md"
LICENCES = "apache-2.0, mit, cc-by-4.0, cc-by-sa-4.0, cc-by-nc-4.0, cc0-1.0, openrail or other"


@dataclasses.dataclass(frozen=True)
class PushCommand:
    """What `push` takes.

    Attributes:
        folder: a work directory, or anything else that `gfl_jax.load` opens.
        target: OWNER/NAME on the hub; or a folder to write, beginning with ./, ../, ~, / or gs://.
        data: where the validation images are; by default where they were in the training.
        license: of the weights, which must be given, as the hub spells it: apache-2.0, mit,
            cc-by-4.0, cc-by-nc-4.0, other. It may depend on the images and on pretrained weights.
        license_name: of a license 'other'.
        license_link: to the text of a license 'other'.
        dataset: name of the data in the card; empty: that of its folder.
        results: COCO results of these weights on the validation images; empty: those of the
            training if they are of these weights, else the images are predicted on.
        resamples: how often the images are drawn again for the intervals of AP.
        seed: of these draws.
        public: whether everybody can see a new model; otherwise only its owner.
        update: whether the target may exist already.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    data: Data = Data()
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    dataset: str = ""
    results: str = ""
    resamples: int = 1000
    seed: int = 0
    public: bool = False
    update: bool = False


def main(arguments: list[str]) -> None:
    """A run to a model that others can load."""
    default = PushCommand(tyro.MISSING, tyro.MISSING)
    if named := positional(arguments):
        run = load(named)
        default = dataclasses.replace(default, folder=named, data=run.experiment.data)
    command = parse_command(default, arguments, "gfl-jax push", __doc__)
    licence = _licence(command)
    if command.resamples < 100:
        raise UsageError(f"--resamples is {command.resamples}; intervals need at least 100")
    folder = _folder(command)
    if folder is None:
        check_hub(command.target)
    with needs("report"):  # before minutes of computing
        import hotcoco  # noqa: F401

    measured = measure(run, command)
    name = command.target.rstrip("/").rpartition("/")[2]
    data = command.dataset or data_name(run)
    location = f"hf://{command.target}" if folder is None else command.target
    # Of a folder the card says its name alone: it will be copied.
    used = location if folder is None else f"./{name}"
    text = card(run, name, data, licence, measured, used)
    if folder is not None:
        _write(folder, run, text)
        print(f'{folder} written: gfl_jax.load("{location}"); read its README.md')
        return
    with tempfile.TemporaryDirectory() as temporary:
        _write(epath.Path(temporary), run, text)
        message = f"Step {run.step}" + (f", AP {measured.metrics['AP']:.3f}" if measured else "")
        url = to_hub(
            epath.Path(temporary),
            command.target,
            private=not command.public,
            update=command.update,
            message=message,
        )
    seen = "public" if command.public else "private"
    seen = "as visible as it was, if it was there" if command.update else seen
    print(f'{url} ({seen}): gfl_jax.load("{location}"); read its model card')


def _licence(command: PushCommand) -> Licence:
    """The licence, which only whoever pushes can choose."""
    if not command.license:
        raise UsageError(
            "--license is missing: others must know what they may do with these weights; it may "
            f"depend on the images and pretrained weights. Usual: {LICENCES}"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", command.license):
        raise UsageError(
            f"--license {command.license!r} is not spelled as the hub does; usual: {LICENCES}"
        )
    described = command.license_name, command.license_link
    if not (all(described) if command.license == "other" else not any(described)):
        raise UsageError("--license other, and only that, takes --license-name and --license-link")
    return Licence(command.license, command.license_name, command.license_link)


def _folder(command: PushCommand) -> epath.Path | None:
    """The folder that the target names; None for a model of the hub."""
    target = command.target
    if not target.startswith((".", "/", "~", "gs://")):
        if not re.fullmatch(r"[^/]+/[^/]+", target):
            raise UsageError(
                f"{target} is neither OWNER/NAME on the hub nor a folder, which begins with ./"
            )
        return None
    folder = as_path(target)
    there = [name for name in (CONFIG, WEIGHTS, CARD) if (folder / name).exists()]
    if there and not command.update:
        raise InputError(
            f"{folder} already holds {', '.join(there)}: name another folder, or --update replaces "
            "them"
        )
    return folder


def _write(folder: epath.Path, run: Run, text: str) -> None:
    """The files of a model: weights, config, card."""
    about = without_paths(exported_about(run))
    write_exported(folder, about, run.network, run.variables, run.experiment.detector)
    write(folder / CARD, text)


def measure(run: Run, command: PushCommand) -> Measured | None:
    """How good a run is on its validation images; what the training said if they are not at hand.

    Raises:
        UserError: images that the command names cannot be evaluated on.
    """
    elsewhere = command.data != run.experiment.data
    here = dataclasses.replace(
        run, experiment=dataclasses.replace(run.experiment, data=command.data)
    )
    try:
        split = open_images(here)
    except UserError as error:
        if elsewhere or command.results:
            raise
        print(f"the card says no interval of AP: {error}")
        return _said_by_training(run)
    indices = range(len(split.image_ids))
    truth, _ = annotations_of(split, split.image_ids.tolist())
    same = run.about.get("data", {}).get("val") in (None, key_of(split))
    found = None
    if command.results:
        stored(command.results, split, indices)  # checks them
        results = json.loads(as_path(command.results).read_text())
        numbers, how = numbers_of(truth, results), "detections given in a file"
    elif same and (found := _of_training(run, truth)):
        (numbers, results), how = found, "detections of the evaluation in training"
    else:
        rows = zip(split.image_ids.tolist(), predicted(here, split, indices), strict=True)
        results = [row for image_id, result in rows for row in result.to_coco(image_id)]
        numbers, how = numbers_of(truth, results), "detections computed for this card"
    by = intervals(matched(truth, results), len(indices), command.resamples, command.seed)
    other = "" if same else (" These are not the images that the training was evaluated on.")
    note = (
        f"On {len(indices)} validation images, {how}.{other} The interval is a bootstrap over the "
        f"images ({command.resamples} draws): it says how much other images like these would "
        "change the number, not how much another training would."
    )
    classes = [(entry.name, entry.objects, entry.ap) for entry in numbers.classes]
    return Measured(numbers.metrics, by, classes, len(indices), note)


def _of_training(run: Run, truth: dict[str, Any]) -> tuple[Numbers, list[dict[str, Any]]] | None:
    """The last evaluation of a work directory, if it was of these weights: their AP is the same."""
    folder = as_path(run.folder).parent
    file, ap = folder / "results.json", run.about.get("AP")
    if ap is None or not file.exists():
        return None
    results = json.loads(file.read_text())
    numbers = numbers_of(truth, results)
    return (numbers, results) if abs(numbers.metrics["AP"] - ap) < 1e-6 else None


def _said_by_training(run: Run) -> Measured | None:
    """What the weights say about themselves."""
    if "AP" not in run.about:
        return None
    images = run.about.get("made_with", {}).get("images", {}).get("val", 0)
    entries = read_metrics(as_path(run.folder).parent)
    last = [e for e in entries if e["kind"] == "val" and e["step"] == run.step]
    metrics = {name: entry[name] for entry in last[-1:] for name in METRICS if name in entry}
    note = (
        "Measured in training; without an interval, since the validation images were not at hand "
        "when this card was written."
    )
    return Measured(metrics or {"AP": run.about["AP"]}, {}, [], images, note)


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax push, or python -m gfl_jax push")
