"""Detections on images, folders of images and videos, drawn and as tables.

gfl-jax predict --weights RUN PHOTOS street.jpg clip.mp4 -o OUT
"""

import collections
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from gfl_jax import terminal
from gfl_jax.data import images
from gfl_jax.errors import InputError, MissingFileError, UsageError
from gfl_jax.paths import PathLike, is_remote, local_path, write, writing
from gfl_jax.results import Result, Unreadable
from gfl_jax.run import Run, load
from gfl_jax.tools.video import VIDEOS, annotate_video
from gfl_jax.visualize import plot_sides, save_figure

COLUMNS = ("file", "time", "label", "name", "score", "x1", "y1", "x2", "y2")
SPREADS = ("spread_left", "spread_top", "spread_right", "spread_bottom")


class Source(NamedTuple):
    """A file to predict on.

    Attributes:
        file: its path.
        name: what it is called in the output, relative to the folder that was named.
    """

    file: PathLike
    name: str


def sources_of(named: Iterable[str], out: Path) -> list[Source]:
    """The images and videos in folders, with their subfolders, and the files that are named.

    Args:
        named: files and folders.
        out: where pictures go: those of an earlier run are not taken from a folder.

    Raises:
        MissingFileError: there is no such file.
        InputError: a folder has none, or a picture would replace a file that is read.
    """
    own = {(out / name).resolve() for name in ("pictures", "distributions")}
    sources: list[Source] = []
    for name in named:
        if is_remote(name):
            sources.append(Source(name, name.rpartition("/")[2]))
            continue
        path = local_path(name, "the image")
        if path.is_dir():
            files = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in images.SUFFIXES + VIDEOS
                and file.is_file()
                and not file.name.startswith("._")  # what macOS writes beside a file
                and (path.resolve() in own or not own & set(file.resolve().parents))
            )
            if not files:
                raise InputError(
                    f"{path} has no images or videos: {', '.join(images.SUFFIXES + VIDEOS)}"
                )
            sources += [Source(f, str(f.relative_to(path))) for f in files]
        elif path.exists():
            sources.append(Source(path, path.name))
        else:
            raise MissingFileError(f"{name}: there is no such file or folder")
    sources = _distinct(sources)
    read = {Path(file).resolve() for file, _ in sources if not is_remote(file)}
    for _, name in sources:
        if (drawn := out / "pictures" / drawn_name(name)).resolve() in read:
            raise InputError(f"{drawn} would be replaced by a drawing of it: choose another --out")
    return sources


def _distinct(sources: list[Source]) -> list[Source]:
    """Numbers names whose pictures would have the same name."""
    taken: set[str] = set()
    distinct = []
    for file, name in sources:
        path, unique, number = Path(name), name, 1
        while drawn_name(unique) in taken:
            number += 1
            unique = str(path.with_name(f"{path.stem}-{number}{path.suffix}"))
        taken.add(drawn_name(unique))
        distinct.append(Source(file, unique))
    return distinct


def drawn_name(name: str) -> str:
    """What the picture of a file is called, with an ending that other programs can show."""
    if name.lower().endswith(VIDEOS):
        return name if name.lower().endswith(".mp4") else name + ".mp4"
    shown = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
    return name if name.lower().endswith(shown) else name + ".jpg"


class Tables:
    """What was detected, as COCO results and as rows of a table."""

    def __init__(self, run: Run, score_threshold: float):
        """Nothing yet.

        Args:
            run: the detector.
            score_threshold: least score of a row.
        """
        ids = zip(run.category_ids, run.category_names, strict=True)
        self.images: list[dict[str, Any]] = []
        self.categories = [{"id": i, "name": name} for i, name in ids]
        self.results: list[dict[str, Any]] = []
        self._rows: list[list[Any]] = []
        self._threshold = score_threshold

    def add(self, name: str, result: Result, seconds: float | None = None) -> None:
        """Adds the detections on an image, or on a frame of a video.

        Args:
            name: of the file.
            result: its detections.
            seconds: since the beginning of the video.
        """
        height, width = result.image.shape[:2]
        image = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        self.images.append(image | ({} if seconds is None else {"seconds": seconds}))
        self.results += result.to_coco(image["id"])
        shown = result.above(self._threshold)
        spread = shown.spread() if shown.sides else np.zeros((len(shown), 0))
        for i in range(len(shown)):
            numbers = [*shown.boxes[i].tolist(), *spread[i].tolist()]
            time = "" if seconds is None else f"{seconds:.3f}"
            row = [name, time, int(shown.labels[i]), shown.names[i], f"{shown.scores[i]:.4f}"]
            self._rows.append([*row, *(f"{number:.2f}" for number in numbers)])

    def write(self, out: Path, distributions: bool) -> None:
        """Writes `results.json`, `images.json` and `detections.csv`."""
        described = {"images": self.images, "categories": self.categories}
        write(out / "results.json", json.dumps(self.results))
        write(out / "images.json", json.dumps(described, ensure_ascii=False, indent=1))
        text = io.StringIO()
        writer = csv.writer(text)
        columns = [*COLUMNS, *(SPREADS if distributions else ())]
        writer.writerow(columns)
        # Frames of videos have no spread.
        writer.writerows([*row, *[""] * (len(columns) - len(row))] for row in self._rows)
        # With a byte order mark, without which spreadsheets misread names.
        write(out / "detections.csv", ("\ufeff" + text.getvalue()).encode("utf-8", "replace"))


def predict_images(
    run: Run,
    sources: list[Source],
    out: Path,
    tables: Tables,
    *,
    score_threshold: float,
    distributions: bool,
    white: int,
) -> Iterator[Unreadable]:
    """Predicts on images and draws them; yields those that cannot be read."""
    names: collections.deque[str] = collections.deque(source.name for source in sources)
    stream = run.predictor.stream((source.file for source in sources), distributions, white)
    writing_now: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for result in tqdm(stream, total=len(sources), desc="predicting", unit=" images"):
            name = names.popleft()
            if isinstance(result, Unreadable):
                yield result
                continue
            tables.add(name, result)
            writing_now.append(pool.submit(_draw, result, out, name, score_threshold))
            if len(writing_now) > 8:
                writing_now.popleft().result()
            if distributions and len(result.above(score_threshold)):  # matplotlib has one thread
                with writing(out):
                    file = out / "distributions" / f"{name}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_figure(plot_sides(result, score_threshold), file)
        while writing_now:
            writing_now.popleft().result()


def _draw(result: Result, out: Path, name: str, score_threshold: float) -> None:
    file = out / "pictures" / drawn_name(name)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        result.plot(score_threshold).save(file, quality=92)


def main(
    sources: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE|FOLDER|VIDEO")
    ],
    weights: str,
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "predictions",
    score_threshold: float = 0.3,
    distributions: bool = False,
    batch_size: int = 0,
    white: int = 0,
    classes: tuple[str, ...] = (),
) -> int:
    """Detects objects on images and videos, draws them and writes tables.

    Args:
        sources: images, also in a bucket; folders of images and videos, with their subfolders; and
            videos.
        weights: a work directory, a folder of checkpoints or of `gfl-jax export`, a .pth or
            .safetensors file in mmdetection's names, or hf://OWNER/NAME.
        out: folder for pictures, `results.json` (COCO results, all scores; `images.json` says which
            image is which) and `detections.csv`.
        score_threshold: least score of what is drawn and in the csv.
        distributions: also draw, for each side, how probable each position is, and put the standard
            deviations into the csv; for images.
        batch_size: images computed together; 0: one on a CPU, eight elsewhere.
        white: value of images of 16 bits that is white, such as 4095; 0: as in training.
        classes: names of the classes, for a file that does not say them.

    Returns:
        0, or 1 if some image could not be read.

    Raises:
        UsageError: nothing was named.
        MissingFileError: there is no such file.
        InputError: a folder has no images, or the weights cannot be used.
    """
    if not sources:
        raise UsageError("name at least one image, folder or video")
    folder = local_path(out, "--out")
    if batch_size < 0 or not 0 <= score_threshold <= 1:
        raise UsageError(
            f"--batch-size is {batch_size} and --score-threshold {score_threshold}: the first must "
            "be at least 0, the second between 0 and 1"
        )
    found = sources_of(sources, folder)
    videos = [source for source in found if str(source.file).lower().endswith(VIDEOS)]
    pictures = [source for source in found if source not in videos]
    run = load(weights, classes)
    run.predictor.batch_size = batch_size or run.predictor.batch_size
    tables, unreadable = Tables(run, score_threshold), []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with terminal.sigterm_raises():
        try:
            for error in predict_images(
                run,
                pictures,
                folder,
                tables,
                score_threshold=score_threshold,
                distributions=distributions,
                white=white,
            ):
                unreadable.append(error)
            for video in videos:
                file = folder / "pictures" / drawn_name(video.name)
                try:
                    for seconds, result in annotate_video(run, video.file, file, score_threshold):
                        tables.add(video.name, result, seconds)
                except InputError as error:
                    unreadable.append(Unreadable(str(video.file), error))
        finally:  # also of what Ctrl-C or SIGTERM cut short
            tables.write(folder, distributions)
    kept = sum(result["score"] >= score_threshold for result in tables.results)
    programs = run.predictor.programs
    sizes = ", ".join(f"{n} x {h} x {w}" for n, h, w, _ in sorted(programs)) or "none"
    print(
        f"{len(tables.images)} images, {kept} detections of at least {score_threshold}\n"
        f"  programs compiled: {len(programs)} (images x height x width: {sizes})\n"
        f"  pictures {folder / 'pictures'}, table {folder / 'detections.csv'}, COCO results "
        f"{folder / 'results.json'}"
    )
    for source, reason in unreadable[:20]:
        text = str(reason) if source in str(reason) else f"{source}: {reason}"
        print(f"not read: {text}", file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} of {len(found)} files could not be read", file=sys.stderr)
    return int(bool(unreadable))


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax predict, or python -m gfl_jax predict")
