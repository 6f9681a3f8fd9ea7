"""Damaged and odd checkpoints: each must be refused in plain words or read right.

    python tests/fuzz_weights.py [--count 1000] [--seed 0]

Makes a tiny detector, writes it as .pth (both of torch's formats), .safetensors and as a folder of
checkpoints, changes bytes, names, shapes, types and words of it at random, and reads it. Prints how
many were refused and read, and each failure with the seed that repeats it; ends with status 1 if
there is any: another kind of exception, more than 20 s, a message of over 60 lines, or arrays other
than those written. Where a format has no checksum (torch's older one, safetensors) a changed byte
of an array cannot be seen; these are counted by themselves.
"""

import argparse
import collections
import contextlib
import io
import json
import pickle
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gfl_jax.config import Experiment
from gfl_jax.errors import UserError
from gfl_jax.interop import convert
from gfl_jax.interop.detector_file import read_detector, state_dict
from gfl_jax.interop.initial import read_trained
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.run import describe, load
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import TrainState

EXPERIMENT = Experiment(Model(Backbone(18, width=4), Neck(32), Head(width=32, stacked_convs=1)))
NAMES = ["cat", "dog"]
CONFIG = """
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                           bgr_to_rgb=True),
    backbone=dict(type='ResNet', depth=18, style='pytorch', frozen_stages=1),
    bbox_head=dict(type='GFLHead', num_classes=2, anchor_generator=dict(center_offset=0.0)),
    test_cfg=dict(nms_pre=1000, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6)))
"""
SECONDS, LINES = 20, 60
Arrays = dict[str, np.ndarray]


# ------------------------------------------------------------------ writing, without torch


class _Storage:
    def __init__(self, array: np.ndarray, key: str):
        self.array, self.key = array, key


class _Tensor:
    def __init__(self, array: np.ndarray, key: str):
        self.array, self.key = np.array(array, order="C"), key

    def __reduce__(self) -> tuple:
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        storage = _Storage(self.array, self.key)
        return _rebuild, (storage, 0, self.array.shape, strides, False, OrderedDict())


def _rebuild(*_: Any) -> None:
    """Stands for torch's function of this name in what is pickled."""


_rebuild.__module__, _rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
KINDS = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage", "f8": "DoubleStorage"}


@contextlib.contextmanager
def _torchs_names() -> Iterator[None]:
    """Modules whose names pickle finds where torch would have them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    utils._rebuild_tensor_v2 = _rebuild  # type: ignore[attr-defined]
    for kind in KINDS.values():
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))
    kept = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, _Storage):
            return None
        kind = getattr(sys.modules["torch"], KINDS[obj.array.dtype.str[1:]])
        parts = ("storage", kind, obj.key, "cpu", obj.array.size)
        return parts if sys.modules["torch"].zipped else (*parts, None)  # type: ignore[attr-defined]


def pickled(content: Any, zipped: bool) -> bytes:
    """A checkpoint's pickle; its tensors are `_Tensor`."""
    stream = io.BytesIO()
    with _torchs_names():
        sys.modules["torch"].zipped = zipped  # type: ignore[attr-defined]
        _Pickler(stream, 2).dump(content)
    return stream.getvalue()


def tensors(arrays: Arrays) -> dict[str, Any]:
    """What stands for these arrays in a pickle."""
    return OrderedDict((name, _Tensor(a, str(i))) for i, (name, a) in enumerate(arrays.items()))


def write_zip(file: Path, arrays: Arrays, around: Callable[[Any], Any], damage: Any) -> None:
    """torch's format of today; `damage` changes the bytes of its pickle."""
    stored = tensors(arrays)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", damage(pickled(around(stored), True)))
        archive.writestr("archive/byteorder", "little")
        for tensor in stored.values():
            archive.writestr(f"archive/data/{tensor.key}", tensor.array.tobytes())


def write_legacy(file: Path, arrays: Arrays, around: Callable[[Any], Any], damage: Any) -> None:
    """torch's format until 1.5."""
    stored = tensors(arrays)
    keys = [tensor.key for tensor in stored.values()]
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    head += [damage(pickled(around(stored), False)), pickle.dumps(keys, 2)]
    for tensor in stored.values():
        head += [struct.pack("<q", tensor.array.size), tensor.array.tobytes()]
    file.write_bytes(b"".join(head))


def write_safetensors(file: Path, arrays: Arrays, _: Any, damage: Any) -> None:
    """safetensors; `damage` changes the bytes of its header."""
    kinds, entries, end = {"f4": "F32", "f2": "F16", "i8": "I64", "f8": "F64"}, {}, 0
    for name, array in arrays.items():
        span, end = [end, end + array.nbytes], end + array.nbytes
        kind = kinds[array.dtype.str[1:]]
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
    header = damage(json.dumps(entries).encode())
    data = b"".join(array.tobytes() for array in arrays.values())
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


WRITERS = {"zip.pth": write_zip, "old.pth": write_legacy, "x.safetensors": write_safetensors}


# ------------------------------------------------------------------ changes


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes cut short, flipped, zeroed, doubled or added to."""
    content, at = bytearray(data), int(rng.integers(max(len(data), 1)))
    match rng.integers(6):
        case 0:
            return bytes(content[:at])
        case 1:
            for i in rng.integers(len(content), size=rng.integers(1, 9)) if content else ():
                content[i] ^= 1 << int(rng.integers(8))
        case 2:
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        case 3:
            content[at:at] = content[at : at + int(rng.integers(1, 200))]
        case 4:
            content[at:at] = rng.bytes(int(rng.integers(1, 50)))
        case _:
            del content[at : at + int(rng.integers(1, 200))]
    return bytes(content)


def odd(rng: np.random.Generator) -> Any:
    """A value where another kind is expected."""
    values = [None, True, -1, 0, 3, 1e400, float("nan"), "", "cat", "\0", [], {}, [None], ["cat"]]
    values += [[1, 2], {"classes": 3}, ("dog", "cat"), 10**30, "a" * 300, {"a": {"b": []}}, [[]]]
    return values[rng.integers(len(values))]


def changed_words(rng: np.random.Generator, meta: dict[str, Any]) -> dict[str, Any]:
    """The `meta` of a file with one entry changed."""
    match rng.integers(5):
        case 0:
            return meta | {str(rng.choice(list(meta))): odd(rng)}
        case 1:
            text = damaged(rng, CONFIG.encode()).decode(errors="replace")
            return meta | {"cfg": text}
        case 2:
            word = str(rng.choice(["True", "18", "0.0", "'nms'", "0.05", "1000", "123.675", "1)"]))
            return meta | {"cfg": CONFIG.replace(word, repr(odd(rng)))}
        case 3:
            return meta | {"dataset_meta": {"classes": odd(rng), "category_ids": odd(rng)}}
        case _:
            return meta | {"gfl_jax": json.dumps({"kind": "Experiment", "model": odd(rng)})}


def changed_arrays(rng: np.random.Generator, arrays: Arrays) -> Arrays:
    """Arrays with one missing, misshapen, renamed, of another type, or more of them."""
    arrays, name = dict(arrays), str(rng.choice(list(arrays)))
    array = arrays[name]
    match rng.integers(8):
        case 0:
            del arrays[name]
        case 1:
            shape = rng.integers(0, 4, rng.integers(0, 5))
            arrays[name] = np.zeros(tuple(shape), np.float32)
        case 2:
            arrays[name] = array.reshape(-1)
        case 3:
            arrays[f"{name}.more"] = array
        case 4:
            arrays = {n.replace(".", "_", int(rng.integers(1, 3))): a for n, a in arrays.items()}
        case 5:
            for n in [n for n in arrays if n.startswith(name.rsplit(".", 2)[0])]:
                del arrays[n]
        case 6:
            kind = rng.choice(["f2", "f8", "i8"])
            arrays["bbox_head.integral.project"] = np.arange(rng.integers(4)).astype(kind)
        case _:
            arrays = {f"{rng.integers(3)}.{n}": a for n, a in arrays.items()}
    return arrays


PREFIXES = ("module.", "model.", "_orig_mod.", "model.module.", "net.")


# ------------------------------------------------------------------ cases


class Fuzz:
    """The tiny detector, and one case after another."""

    def __init__(self, folder: Path):
        self.folder = folder
        network = CachedNetwork(EXPERIMENT.model, EXPERIMENT.detector.predicts(len(NAMES)))
        rng = np.random.default_rng(0)
        paths = network.by_path(network.init(0))
        random = {p: rng.normal(size=x.shape).astype("f4") for p, x in paths.items()}
        variables = network.replaced(network.init(0), random)
        self.arrays = state_dict(network, variables, EXPERIMENT.detector)
        state = jax.tree.map(np.asarray, TrainState(np.int32(1), variables, (), {}))
        with Checkpoints(folder / "whole/checkpoints") as checkpoints:
            checkpoints.save(1, state.items(), describe(EXPERIMENT, [1, 2], NAMES))

    def case(self, seed: int) -> str:
        """'refused', 'read', or 'unseen' where a changed number cannot be seen.

        Raises:
            Exception: anything else than a plain error.
        """
        rng = np.random.default_rng(seed)
        try:
            return self._folder(rng) if rng.random() < 0.2 else self._file(rng)
        except UserError as error:
            assert 0 < len(str(error).splitlines()) <= LINES, f"{len(str(error))} characters"
            return "refused"
        finally:
            shutil.rmtree(self.folder / "case", ignore_errors=True)

    def _file(self, rng: np.random.Generator) -> str:
        kind = str(rng.choice(list(WRITERS)))
        arrays, meta = self.arrays, {"cfg": CONFIG, "CLASSES": NAMES, "epoch": 12}
        around, damage, after = str(rng.choice(["state_dict", "model", "more"])), bytes, bytes
        what = rng.integers(6)
        if what == 0:
            prefix = str(rng.choice(PREFIXES))
            arrays = {prefix + name: array for name, array in arrays.items()}
        elif what == 1:
            meta = changed_words(rng, meta)
        elif what == 2:
            arrays = changed_arrays(rng, arrays)
        elif what == 3:
            damage = lambda data: damaged(rng, data)  # noqa: E731
        elif what == 4:
            after = lambda data: damaged(rng, data)  # noqa: E731
        else:
            around = str(odd(rng))
        file = self.folder / "case" / kind
        file.parent.mkdir()
        WRITERS[kind](file, arrays, lambda state: {"meta": meta, around: state}, damage)
        file.write_bytes(after(file.read_bytes()))
        trained = read_trained(str(file))
        loaded = read_detector(file)
        convert._classes(convert.classes_in({}), convert.Classes([1, 2], NAMES), file, "a.json")
        assert not trained.classes or len(trained.classes) < 9
        found = state_dict(loaded.network, loaded.variables, loaded.experiment.detector)
        return self._compared(found, unseen=what == 3 or (what == 4 and kind != "zip.pth"))

    def _folder(self, rng: np.random.Generator) -> str:
        shutil.copytree(self.folder / "whole", self.folder / "case")
        files = sorted(f for f in (self.folder / "case").rglob("*") if f.is_file())
        file = files[rng.integers(len(files))]
        match rng.integers(4):
            case 0:
                file.unlink()
            case 1:
                shutil.rmtree(file.parent)
            case 2:
                about = next(f for f in files if "about" in f.parts and f.name == "metadata")
                content = json.loads(about.read_text())
                content[str(rng.choice(list(content)))] = odd(rng)
                about.write_text(json.dumps(content))
            case _:
                file.write_bytes(damaged(rng, file.read_bytes()))
        run = load(self.folder / "case")
        found = state_dict(run.network, run.variables, run.experiment.detector)
        return self._compared(found, unseen=True)

    def _compared(self, found: Arrays, *, unseen: bool) -> str:
        same = found.keys() == self.arrays.keys() and all(
            np.array_equal(array, self.arrays[name]) for name, array in found.items()
        )
        assert same or unseen, "other arrays than those written"
        return "read" if same else "unseen"


class CachedNetwork(Network):
    """A network whose arrays are zeros, made once: only what reads them is looked at."""

    known: ClassVar[dict[Any, Any]] = {}

    def __init__(self, model: Any, predicts: Any):
        key = (model, predicts)
        if key not in self.known:
            super().__init__(model, predicts)
            self.known[key] = vars(self), jax.eval_shape(lambda: Network.init(self, 0))
        self.__dict__, self.shapes = dict(self.known[key][0]), self.known[key][1]

    def init(self, seed: int) -> Any:
        """Zeros."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"a case took more than {SECONDS} s")


def fuzz(count: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Runs the cases seed, seed + 1, ...

    Returns:
        How many ended in which way; and of each failure its seed and traceback.
    """
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    kept, before = (convert.Network, load.__globals__["Network"]), signal.getsignal(signal.SIGALRM)
    convert.Network = load.__globals__["Network"] = CachedNetwork  # type: ignore[misc]
    signal.signal(signal.SIGALRM, _too_long)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases = Fuzz(Path(folder))
            for number in range(seed, seed + count):
                signal.alarm(SECONDS)
                try:
                    counts[cases.case(number)] += 1
                except Exception:
                    counts["failed"] += 1
                    failures.append(f"seed {number}:\n{traceback.format_exc(limit=-4)}")
                finally:
                    signal.alarm(0)
    finally:
        convert.Network, load.__globals__["Network"] = kept  # type: ignore[misc]
        signal.signal(signal.SIGALRM, before)
    return dict(counts), failures


def main() -> int:
    """Counts, failures, and 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts, failures = fuzz(arguments.count, arguments.seed)
    print(*failures, sep="\n")
    print(f"seeds {arguments.seed} to {arguments.seed + arguments.count - 1}: {counts}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
