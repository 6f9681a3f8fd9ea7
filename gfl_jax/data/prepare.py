"""Checks a COCO-format data set and writes it in the format that `gfl_jax.data.records` reads.

`prepare`, called by the command of this name, writes a folder that can be copied anywhere and used
with `--data.prepared FOLDER`.
`gfl_jax.data.cache` does the same behind the scenes for a data set given by its raw files.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from gfl_jax.data import images
from gfl_jax.data.coco_format import (
    DataReport,
    ImageEntry,
    OnError,
    Problem,
    check,
    data_error,
    for_evaluation,
    read_json,
)
from gfl_jax.data.folders import locked, new_folder
from gfl_jax.data.manifest import MANIFEST, split_entry, write_manifest
from gfl_jax.data.records import Table
from gfl_jax.data.sixteen_bits import (
    WHITE,
    as_8_bits,
    dark_images,
    nearly_largest,
    read_16_bits,
)
from gfl_jax.errors import InputError

_SHARD_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True)
class RawSplit:
    """A split in COCO's format, or in another form that was read into it.

    Attributes:
        annotations: the json; of another form, the file or folder that says where the objects are.
        images: the folder that file names are relative to.
        white: value of 16-bit images that becomes white; 0: 65535, but images that would then be
            nearly black are an error.
        read: what `gfl_jax.data.forms` made of another form; None: `annotations` is a json.
    """

    annotations: Path
    images: Path
    white: int = 0
    read: dict[str, Any] | None = None

    def __post_init__(self):
        if not 0 <= self.white <= WHITE:
            raise InputError(f"data.white is {self.white}; give a value of 16 bits, or 0")

    @functools.cached_property
    def content(self) -> tuple[dict[str, Any], str]:
        """What the json holds, and its digest; see `read_json`. Read once."""
        if self.read is None:
            return read_json(self.annotations)
        said = json.dumps(self.read, default=str, sort_keys=True)
        return self.read, hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def prepare(
    folder: Path, splits: Mapping[str, RawSplit], on_error: OnError, *, overwrite: bool = False
) -> bool:
    """Checks a data set and writes all of it into a folder.

    Args:
        folder: to be made, on a local disk; complete or absent.
        splits: by name.
        on_error: "raise" stops at bad input; "skip" leaves it out.
        overwrite: whether to replace a prepared folder; otherwise an existing one is kept.

    Returns:
        Whether it was made.

    Raises:
        DataError: there are problems (see `check`), or image files that do not decode to the size
            that the json states; or something else is in the way.
    """
    with locked(folder):
        if (folder / MANIFEST).is_file():
            if not overwrite:
                return False
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise data_error(
                "in the way", folder, f"not empty, and not a prepared data set (no {MANIFEST})"
            )
        with new_folder(folder) as partial:
            write_prepared(partial, splits, on_error)
        return True


def make_table(
    image_ids: Sequence[int],
    filenames: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    objects: Sequence[Sequence[tuple[Sequence[float], int, bool, int]]],
) -> Table:
    """Builds a table.

    Args:
        image_ids: of N images.
        filenames: of N images.
        sizes: (height, width) of N images, in pixels.
        objects: of each image ((x1, y1, x2, y2) in pixels, label, crowd, rule).
    """
    flat = [entry for entries in objects for entry in entries]
    boxes, labels, crowd, rule = zip(*flat, strict=True) if flat else ((), (), (), ())
    return Table(
        np.array(image_ids, np.int64),
        np.array([name.encode("utf-8", "surrogateescape") for name in filenames], np.bytes_),
        np.array(sizes, np.int32).reshape(-1, 2),
        np.cumsum([0, *map(len, objects)], dtype=np.int64),
        np.array(boxes, np.float64).reshape(-1, 4).astype(np.float32),
        np.array(labels, np.int32),
        np.array(crowd, bool),
        np.array(rule, np.uint8),
    )


def save_table(file: epath.Path, table: Table) -> None:
    """Writes a table as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **table._asdict())  # type: ignore[arg-type]
    file.write_bytes(buffer.getvalue())


def report_of(folder: epath.Path, split: str) -> str:
    """A small table of what became of a split's images and annotations."""
    report = json.loads((folder / split / "report.json").read_text())
    problems = [Problem(**problem) for problem in report.pop("problems")]
    return DataReport(problems=problems, **report).summary()


def write_prepared(folder: Path, splits: Mapping[str, RawSplit], on_error: OnError) -> None:
    """Writes a prepared folder; the manifest comes last."""
    entries = {name: _write_split(folder, name, raw, on_error) for name, raw in splits.items()}
    write_manifest(epath.Path(folder), entries)


def _write_split(folder: Path, split: str, raw: RawSplit, on_error: OnError) -> dict[str, Any]:
    """Writes the files of a split; returns its entry in the manifest."""
    from array_record.python.array_record_module import ArrayRecordWriter

    (folder / split).mkdir()
    content, digest = raw.content
    entries, report = check(content, raw.annotations, raw.images, on_error)
    shards: dict[str, int] = {}
    kept: list[ImageEntry] = []
    brightest: dict[str, int] = {}  # of images of 16 bits
    crc32 = 0
    parts = _shards(entries, raw.images)
    with tqdm(total=len(entries), desc=f"preparing {split}", unit=" images") as progress:
        for i, part in enumerate(parts):
            name = f"{split}/images-{i:05d}-of-{len(parts):05d}.array_record"
            before = len(kept)
            # Photos are already compressed.
            writer = ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
            for entry, data in _load(part, raw, report.problems, brightest):
                progress.update()
                if data is not None:
                    writer.write(data)
                    crc32 = zlib.crc32(data, crc32)
                    kept.append(entry)
            try:
                writer.close()
            except RuntimeError as error:
                raise OSError(str(error)) from error
            shards[name] = len(kept) - before
    report.conclude(kept, on_error)
    if not raw.white and (found := dark_images(brightest)):
        file, white, detail = found
        advice = (
            f"Networks see the upper 8 bits, here nearly black. --data.white {white} (gfl-jax "
            f"prepare: --white {white}) makes {white} white; {WHITE} takes them as they are."
        )
        raise data_error("dark images", raw.images / file, detail, advice)

    table = make_table(
        [entry.image_id for entry in kept],
        [entry.filename for entry in kept],
        [entry.size for entry in kept],
        [entry.objects for entry in kept],
    )
    save_table(epath.Path(folder / split / "table.npz"), table)
    categories = {"category_ids": report.category_ids, "category_names": report.category_names}
    annotations = json.dumps(for_evaluation(kept, dict(zip(*categories.values(), strict=True))))
    (folder / split / "annotations.json").write_text(annotations)
    (folder / split / "report.json").write_text(json.dumps(_relocatable(report), indent=1))
    return {
        "made_from": {"annotations": raw.annotations.name, "sha256": digest, "on_error": on_error},
        "images": report.images_kept,
        "content": zlib.crc32(annotations.encode(), crc32),
        "annotations": report.annotations_kept,
        **categories,
        **split_entry(epath.Path(folder), split, shards),
    }


def _shards(entries: Sequence[ImageEntry], folder: Path) -> list[Sequence[ImageEntry]]:
    """Cuts the images into files of about 128 MiB."""
    parts: list[list[ImageEntry]] = [[]]
    size = 0
    for entry in entries:
        if size >= _SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += (folder / entry.filename).stat().st_size
    return parts  # type: ignore[return-value]


def _load(
    entries: Sequence[ImageEntry],
    raw: RawSplit,
    problems: list[Problem],
    brightest: dict[str, int],
) -> Iterator[tuple[ImageEntry, bytes | None]]:
    """Yields images with their files' bytes; for a faulty file, None, and adds a problem."""

    def load(entry: ImageEntry) -> bytes | Problem:
        """Reads an image file and makes sure that it decodes to the size the json states."""
        try:
            data = (raw.images / entry.filename).read_bytes()
            if (deep := read_16_bits(data)) is not None:
                brightest[entry.filename] = nearly_largest(deep)
                data = as_8_bits(deep, raw.white) if raw.white else data
            images.decode(data, entry.size, entry.filename)
        except (OSError, ValueError) as error:
            wrong_size = isinstance(error, images.ImageSizeError)
            kind = "wrong image size" if wrong_size else "broken image file"
            detail = str(error).removeprefix(f"{entry.filename}: ")
            return Problem(kind, entry.filename, entry.image_id, None, detail)
        return data

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(entries), 64):
            block = entries[start : start + 64]
            for entry, loaded in zip(block, pool.map(load, block), strict=True):
                if isinstance(loaded, Problem):
                    problems.append(loaded)
                    yield entry, None
                else:
                    yield entry, loaded


def _relocatable(report: DataReport) -> dict[str, Any]:
    """A report as JSON that names the annotation file without its folder."""
    name = Path(report.annotations_file).name
    problems = [
        p if p.file != report.annotations_file else dataclasses.replace(p, file=name)
        for p in report.problems
    ]
    return dataclasses.asdict(dataclasses.replace(report, annotations_file=name, problems=problems))
