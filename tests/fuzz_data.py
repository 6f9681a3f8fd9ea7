"""Mutated annotation files and images: each is refused in plain words, or its report adds up.

    python tests/fuzz_data.py --annotations 10000 --images 2000 --seed 0

A file that is read must be read alike by training and by evaluation: perfect detections of what is
demanded have AP 1, and a batch of what is trained on can be loaded. Prints what became of the files
and, for one that did neither, the case's number, which `--only` repeats.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import cv2
import numpy as np

from gfl_jax.coco_eval import evaluate, ground_truth
from gfl_jax.data.cache import open_in_cache
from gfl_jax.data.coco_format import DataError
from gfl_jax.data.pipeline import ImageCache, load_batch, max_boxes_of
from gfl_jax.data.plan import train_plan
from gfl_jax.data.prepare import RawSplit
from gfl_jax.data.sources import Data
from gfl_jax.errors import InputError

SECONDS = 60
"""After which a case counts as hanging."""

HEIGHT, WIDTH = 40, 48

ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 10, 10**9, 2**31, 2**53, 2**63, 10**30, 0.0, 0.5, 1.0),
    *(-0.0, 1e-9, 1e-300, 1e37, 1e39, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "0", "1", "1.5", "cat", "false", "\0", "../1.jpg", "/", ".", "ä\ud800", "x" * 5000),
    *("1.jpg", "sub/1.jpg", "C:\\1.jpg", "https://example.org/1.jpg", b"".hex()),
    *([], {}, [[]], [{}], {"id": 1}, [1, 2, 3, 4], [0, 0, 0, 0], [1.5, 2, 1e-9, 3], [0.1] * 4),
    *([-5, -5, 500, 500], [1e30, 1, 2, 3], [30, 30, 40, 44], ["1", "2", "3", "4"], [None] * 4),
)
NAMES = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "file_name")
NAMES = (*NAMES, "height", "width", "name", "segmentation", "images", "annotations", "categories")


def picture(seed: int) -> np.ndarray:
    """A small image with some structure, uint8 [HEIGHT, WIDTH, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(noise, (WIDTH, HEIGHT))


def content_of() -> dict:
    """A good json of four images with two objects each."""
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, 5)
    ]
    annotations = [
        {
            "id": 2 * i + k,
            "image_id": i + 1,
            "category_id": 1 + 2 * k,
            "bbox": [3 + 20 * k, 4 + i, 15.5, 12.25],
            "area": 189.875,
            "iscrowd": 0,
        }
        for i in range(4)
        for k in range(2)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


# ---------------------------------------------------------------------------- mutations


def places(value: object) -> list[tuple]:
    """(container, key) of everything in a json, outermost first."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in pairs:
        found.append((value, key))
        if isinstance(item, dict | list):
            found += places(item)
    return found


def mutate_json(rng: random.Random, content: dict) -> None:
    """Changes one thing of a json."""
    found = places(content)
    if not found:
        return
    holder, key = rng.choice(found)
    other, other_key = rng.choice(found)
    what = rng.randrange(7)
    if what == 0:
        del holder[key]
    elif what == 1:
        holder[key] = copy.deepcopy(other[other_key])
    elif what == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif what == 3 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = holder.pop(key)
    elif what == 4 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = copy.deepcopy(rng.choice(ODD))
    elif what == 5 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((-1, 0, 0.5, 2, 1e3)) + rng.choice((0, 1, -1, 0.01))
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Changes the bytes of a file."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 8, 100))
        what = rng.randrange(7)
        if what == 0:
            del changed[at:]
        elif what == 1:
            del changed[at : at + length]
        elif what == 2:
            changed[at:at] = rng.randbytes(length)
        elif what == 3:
            changed[at : at + length] = bytes(length)
        elif what == 4:
            changed[at:at] = changed[:length]
        elif at < len(changed):
            # Headers are short and matter most.
            at = at if what == 5 else at % min(64, len(changed))
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


FORMATS = (
    *((".jpg", ()), (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)), (".png", ()), (".bmp", ())),
    *((".webp", ()), (".tiff", ()), (".ppm", ()), (".jp2", ())),
)


def mutated_image(rng: random.Random) -> bytes:
    """An image file of some format, changed; one in ten is not."""
    ending, options = rng.choice(FORMATS)
    image = picture(rng.randrange(100))
    if ending in (".png", ".tiff") and rng.random() < 0.3:
        image = image.astype(np.uint16) * 257
    elif rng.random() < 0.2:
        image = image[..., 0]
    done, encoded = cv2.imencode(ending, image, options)
    if not done:  # not every format has every kind of image
        _, encoded = cv2.imencode(".png", image)
    data = encoded.tobytes()
    return data if rng.random() < 0.1 else mutate_bytes(rng, data)


# ---------------------------------------------------------------------------- one case


@contextlib.contextmanager
def deadline():
    """Raises TimeoutError in what hangs."""

    def late(*_):
        raise TimeoutError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(raw: RawSplit, cache: Path, on_error: str) -> str:
    """'refused', 'whole' or 'in part'; raises AssertionError for what must not be."""
    raw = dataclasses.replace(raw)  # which has not read the json yet
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            split = open_in_cache("val", raw, cache, on_error)
    except DataError as error:
        named = [raw.annotations.name, str(raw.images), *(p.file for p in error.problems)]
        assert any(name and name in str(error) for name in named), "no file is named"
        for problem in error.problems:
            assert problem.detail, "a problem without words"
        return "refused"
    report = json.loads((split.annotations.parent / "report.json").read_text())
    assert on_error == "skip" or not report["problems"], "problems were passed over"
    if on_error == "skip":
        adds_up(json.loads(raw.annotations.read_bytes()), report, set(split.image_ids.tolist()))
        used_alike(split)
    return "in part" if report["problems"] else "whole"


def adds_up(content: dict, report: dict, kept: set[int]) -> None:
    """Everything of the json is kept or stands in the report."""
    assert report["images_found"] == len(content["images"])
    assert report["annotations_found"] == len(content["annotations"])
    assert report["images_kept"] == len(kept)
    by_kind = collections.Counter(p["kind"] for p in report["problems"])
    of_images = ("malformed image", "duplicate image id", "missing image file")
    of_images += ("broken image file", "wrong image size")
    left_out = sum(by_kind[kind] for kind in of_images)
    assert report["images_kept"] + left_out == report["images_found"], "images do not add up"
    faults = ("absent image", "unknown category", "bad box", "empty box", "box outside image")
    faulty = {p["annotation_id"] for p in report["problems"] if p["kind"] in faults}
    left_out = by_kind["malformed annotation"] + by_kind["duplicate annotation id"] + len(faulty)
    orphans = report["annotations_found"] - report["annotations_kept"] - left_out
    possible = [
        entry
        for entry in content["annotations"]
        if isinstance(entry, dict) and entry.get("image_id") not in list(kept)
    ]
    assert 0 <= orphans <= len(possible), "annotations do not add up"


def used_alike(split) -> None:
    """What is demanded can be found, and what is trained on can be loaded."""
    truth = ground_truth(split)
    demanded = [a for a in truth.dataset["annotations"] if not a["iscrowd"]]
    results = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.5}
        for a in demanded
    ]
    # Areas outside COCO's range 0 to 1e10 are not counted by pycocotools.
    counted = any(0 <= a["area"] <= 1e10 for a in demanded)
    ap = evaluate(results, truth, split.image_ids.tolist()).metrics["AP"]
    assert abs(ap - (1 if counted else -1)) < 1e-6, f"perfect detections have AP {ap}"
    thin = sum(int(n) for n in split.num_boxes)
    assert thin <= len(demanded), "more is trained on than demanded"
    data = Data(scale=(64, 64), workers=0)
    for record in split.source:
        assert record["image"], "an empty image"
    try:
        plan = train_plan(data, split, 2, 0)
    except InputError:
        return
    for step in range(plan.steps_per_epoch):
        host = load_batch(
            step, plan=plan, split=split, max_boxes=max_boxes_of(split), cache=ImageCache(0)
        )
        boxes = host.batch.boxes[host.batch.box_mask]
        assert np.isfinite(boxes).all(), "boxes are not finite"
        assert (host.batch.labels < len(split.category_ids)).all(), "a label is no class"


# ---------------------------------------------------------------------------- many cases


def annotation_case(number: int, seed: int, folder: Path) -> str:
    """Mutates an annotation file and opens it."""
    rng = random.Random(f"{seed} annotations {number}")
    content = content_of()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        mutate_json(rng, content)
    data = json.dumps(content).encode()
    if rng.random() < 0.1:
        data = mutate_bytes(rng, data)
    (folder / "a.json").write_bytes(data)
    raw = RawSplit(folder / "a.json", folder / "images")
    return opened_both_ways(raw, folder)


def image_case(number: int, seed: int, folder: Path) -> str:
    """Mutates one of two image files and opens them."""
    rng = random.Random(f"{seed} images {number}")
    content = content_of()
    content["images"][1]["file_name"] = "mutated"
    (folder / "images" / "mutated").write_bytes(mutated_image(rng))
    (folder / "a.json").write_text(json.dumps(content))
    return opened_both_ways(RawSplit(folder / "a.json", folder / "images"), folder)


def opened_both_ways(raw: RawSplit, folder: Path) -> str:
    """What becomes of a data set; raising at its faults and leaving them out must agree."""
    found = []
    for on_error in ("raise", "skip"):
        with tempfile.TemporaryDirectory(dir=folder) as cache, deadline():
            found.append(outcome(raw, Path(cache), on_error))
    assert (found[0] == "whole") == (found[1] == "whole"), f"raise: {found[0]}, skip: {found[1]}"
    return found[1]


def fuzz(case, count: int, seed: int, only: int = -1) -> tuple[collections.Counter, list[str]]:
    """Runs cases 0 to count - 1, or only one.

    Returns:
        How many were refused, whole and in part; and a text for each that failed.
    """
    outcomes: collections.Counter = collections.Counter()
    failures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for i in range(1, 5):
            cv2.imwrite(str(folder / "images" / f"{i}.jpg"), picture(i))
        for number in range(count) if only < 0 else [only]:
            try:
                outcomes[case(number, seed, folder)] += 1
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                failures.append(f"{case.__name__} {number}: {type(error).__name__} {error} {where}")
                if only >= 0:
                    raise
    return outcomes, failures


def main() -> int:
    """Prints the counts; the status is 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotations", type=int, default=10000)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=-1, help="one case")
    options = parser.parse_args()
    failed = []
    for case, count in ((annotation_case, options.annotations), (image_case, options.images)):
        if count:
            outcomes, failures = fuzz(case, count, options.seed, options.only)
            failed += failures
            print(
                f"{case.__name__}: {count} with seed {options.seed}: {dict(outcomes)}", flush=True
            )
    print("\n".join(failed[:50]))
    print(f"{len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    sys.exit(main())
