"""Checks a data set in the form it has, prepares it once, and says what is in it.

gfl-jax prepare SRC DST
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from gfl_jax.cli import load_experiment
from gfl_jax.config import Experiment
from gfl_jax.data.coco_format import OnError, data_error
from gfl_jax.data.folders import local_folder
from gfl_jax.data.forms.folder import Form, read_folder, splits_of
from gfl_jax.data.manifest import MANIFEST, read_manifest
from gfl_jax.data.prepare import RawSplit, prepare, report_of
from gfl_jax.data.records import open_prepared
from gfl_jax.data.suspicions import suspicion
from gfl_jax.errors import InputError
from gfl_jax.tools.findings import description, suggestions
from gfl_jax.visualize import ground_truth_sheet

TRAIN = "annotations/instances_train2017.json", "train2017"
VAL = "annotations/instances_val2017.json", "val2017"


def main(
    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")],
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")],
    *,
    form: Form = "auto",
    images: str = "",
    train_list: str = "",
    val_list: str = "",
    val_share: float = 0.2,
    train_annotations: str = TRAIN[0],
    train_images: str = TRAIN[1],
    val_annotations: str = VAL[0],
    val_images: str = VAL[1],
    on_error: OnError = "raise",
    white: int = 0,
    overwrite: bool = False,
    config: str = "gfl_r50_fpn_1x_coco",
) -> None:
    """Checks a data set, prepares it once for `--data.prepared DST`, and says what is in it.

    SRC may be in COCO's format, a Pascal VOC or YOLO folder, or an export of CVAT or Label Studio:
    its files show which. DST then holds all that training and evaluation read, and pictures of the
    ground truth. It can be copied anywhere, even to a bucket, and needs nothing of SRC.

    Args:
        src: folder of the data set.
        dst: folder to make; complete or absent.
        form: the form of SRC; 'auto': as its files show.
        images: folder of the images, relative to SRC; empty: looked for.
        train_list: name of the list of images to train on, where the form has such; empty: train,
            or else trainval.
        val_list: name of the list of images to evaluate on; empty: val, or else test.
        val_share: share of the images to evaluate on where there are no lists, chosen by a hash of
            their names.
        train_annotations: COCO json of the training images, relative to SRC. A split without a json
            is left out.
        train_images: folder of its images, relative to SRC.
        val_annotations: COCO json of the images to evaluate on, relative to SRC.
        val_images: folder of its images, relative to SRC.
        on_error: 'raise' stops at bad input; 'skip' leaves it out, counts it and lists it.
        white: value of 16-bit images that becomes white, such as 4095; 0: 65535, but images that
            would then be nearly black are an error.
        overwrite: prepares again even if DST is complete.
        config: what the suggestions are for: a config file, or the name of one that comes with
            gfl_jax.

    Raises:
        DataError: the data is faulty; every problem is named.
        InputError: SRC is in none of the forms, or could be in several.
    """
    root, folder = local_folder(src, "SRC"), local_folder(dst, "DST")
    experiment = load_experiment(config)
    complete = (folder / MANIFEST).is_file() and not overwrite
    if complete and not root.is_dir():
        print(f"{folder} is complete, and there is no {root}: nothing to do")
        return
    train = RawSplit(root / train_annotations, root / train_images, white)
    val = RawSplit(root / val_annotations, root / val_images, white)
    named = (train_annotations, train_images, val_annotations, val_images) != (*TRAIN, *VAL)
    named |= train.annotations.is_file() or val.annotations.is_file()
    if named and form in ("auto", "coco"):
        splits = _named(train, val)
    else:
        found, said = read_folder(root, form, images)
        contents, why = splits_of(found, train_list, val_list, val_share)
        print("\n".join([said, f"  {why}", *(f"  {note}" for note in found.notes)]))
        splits = {
            name: RawSplit(found.file, found.folder, white, content)
            for name, content in contents.items()
        }
    if complete:
        _check_same(folder, splits)
        print(f"{folder} is complete: nothing to do (--overwrite prepares it again)")
    prepare(folder, splits, on_error, overwrite=overwrite)
    for name in splits:
        split = open_prepared(folder, name)
        print(f"\n{name}: {report_of(epath.Path(folder), name)}\n{description(split)}")
        if on_error == "skip":
            print(f"  what was left out, one by one: {folder / name / 'report.json'}")
        if warning := suspicion(split.table):
            print(f"warning: {name}: {warning}")
        picture = folder / f"ground_truth_{name}.png"
        ground_truth_sheet(picture, split)
        print(f"  look at the boxes: {picture}")
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    print(f"\n{folder}: {size / 1e9:.2f} GB, train with --data.prepared {dst}")
    if "train" in splits:
        _suggest(config, experiment, folder, dst)


def _check_same(folder: Path, splits: Mapping[str, RawSplit]) -> None:
    """Raises an error if a complete folder was made from other annotations or lists."""
    made = read_manifest(epath.Path(folder))["splits"]
    for name, raw in splits.items():
        stored = made.get(name, {}).get("made_from", {})
        if stored.get("sha256") != raw.content[1]:
            raise InputError(
                f"{folder} was made from other annotations or lists of images (its {name} from "
                f"{stored.get('annotations', 'nothing')}): name another DST, or --overwrite "
                "prepares it again"
            )


def _suggest(config: str, experiment: Experiment, folder: Path, dst: str) -> None:
    """Prints what follows from the training images for a config, and the command."""
    try:
        found = suggestions(experiment, open_prepared(folder, "train"))
    except InputError as error:
        print(f"warning: {error}")
        return
    print(f"\nsuggestions for {config} (--config names another):")
    for suggestion in found:
        print(f"  {suggestion.flag or 'as it is'}: {suggestion.reason}")
    flags = [suggestion.flag for suggestion in found if suggestion.flag]
    command = f"gfl-jax train {shlex.quote(config)} --data.prepared {shlex.quote(dst)}"
    print("\n  " + " ".join([command, *flags]))


def _named(train: RawSplit, val: RawSplit) -> dict[str, RawSplit]:
    """The splits whose COCO jsons exist.

    Raises:
        DataError: neither does.
    """
    named = {"train": train, "val": val}
    splits = {name: raw for name, raw in named.items() if raw.annotations.is_file()}
    if not splits:
        detail = f"no such file, and no {val.annotations}"
        raise data_error("missing annotation file", train.annotations, detail)
    for name in named.keys() - splits.keys():
        print(f"{name}: left out, there is no {named[name].annotations}")
    return splits


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax prepare, or python -m gfl_jax prepare")
