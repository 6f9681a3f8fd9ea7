import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gfl_jax.interop.torch_files import read_torch_file

MAGIC = 0x1950A86A20F9469CFC6C
DATA = np.arange(6, dtype=np.float32)
RAW = DATA.tobytes()


# Checkpoints by hand, opcode by opcode, so that these tests do without torch.


def op(value):
    return pickle.dumps(value, 2)[2:-1]


def call(name, *args):
    return b"c%s\n%s\n(" % tuple(name.encode().rsplit(b".", 1)) + b"".join(args) + b"tR"


def mapping(**items):
    return b"}(" + b"".join(op(k) + v for k, v in items.items()) + b"u"


def tensor(size=(2, 3), stride=(3, 1), offset=0, store=None, kind="FloatStorage"):
    pid = op("storage") + b"ctorch\n%s\n" % kind.encode() + op("0") + op("cpu") + op(6)
    store = store or b"(" + pid + b"tQ"
    hooks = call("collections.OrderedDict")
    args = (store, op(offset), op(size), op(stride), op(False), hooks)
    return call("torch._utils._rebuild_tensor_v2", *args)


def write_zip(path, body, data=RAW, byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        if byteorder:
            archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", data)


def write_legacy(path, body, data=RAW):
    parts = [pickle.dumps(x, 2) for x in (MAGIC, 1001, {"little_endian": True})]
    parts += [b"\x80\x02" + body + b".", pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(parts) + (6).to_bytes(8, "little") + data)


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@WRITERS
def test_handmade_checkpoint(tmp_path, write):
    write(tmp_path / "x.pth", mapping(state_dict=mapping(w=tensor(), n=op(3)), meta=op({"a": 1})))
    (name, array), *rest = read_torch_file(tmp_path / "x.pth").arrays.items()
    assert (name, rest) == ("w", [])
    np.testing.assert_array_equal(array, DATA.reshape(2, 3), strict=True)
    assert array.flags.c_contiguous and array.flags.writeable


@pytest.mark.parametrize("order,swapped", [(None, False), (b"little", False), (b"big", True)])
def test_byteorder(tmp_path, order, swapped):
    data = DATA.astype(">f4" if swapped else "<f4").tobytes()
    write_zip(tmp_path / "x.pth", mapping(w=tensor()), data, order)
    np.testing.assert_array_equal(
        read_torch_file(tmp_path / "x.pth").arrays["w"], DATA.reshape(2, 3)
    )


@WRITERS
def test_python2_strings_and_parameters(tmp_path, write):
    parameter = call("torch.nn.parameter.Parameter", tensor()) + op((True, False, None)) + b"b"
    write(tmp_path / "x.pth", b"}(U\x01w" + parameter + b"u")
    np.testing.assert_array_equal(
        read_torch_file(tmp_path / "x.pth").arrays["w"], DATA.reshape(2, 3)
    )


@WRITERS
def test_mmengine_checkpoint(tmp_path, write):
    history = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
    method = call("__builtin__.getattr", history, op("mean"))
    state = mapping(_log_history=op(np.arange(3.0)), statistics_methods=mapping(mean=method))
    hub = mapping(log_scalars=mapping(loss=history + b")\x81" + state + b"b"))
    extra = {"seed": np.float64(1), "classes": ("a", "b"), "bytes": b"\xff", "set": {1}}
    write(
        tmp_path / "x.pth",
        mapping(
            meta=op(extra),
            message_hub=hub,
            optimizer=mapping(s=tensor()),
            state_dict=mapping(w=tensor()),
        ),
    )
    arrays, meta = read_torch_file(tmp_path / "x.pth")
    assert list(arrays) == ["w"]
    assert meta["classes"] == ("a", "b")


class Evil:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@WRITERS
@pytest.mark.parametrize("where", ["top", "value", "meta", "argument"])
def test_malicious_pickle_is_refused(tmp_path, write, where):
    marker = tmp_path / "executed"
    evil = Evil(os.system, (f"touch {marker}",))
    pickle.loads(pickle.dumps(evil, 2))
    assert marker.exists()  # the attack works on pickle itself
    marker.unlink()
    body = {
        "top": op(evil),
        "value": mapping(w=tensor(), x=op(evil)),
        "meta": mapping(state_dict=mapping(w=tensor()), meta=op({"a": [evil]})),
        "argument": mapping(w=call("__builtin__.getattr", op(evil))),
    }[where]
    path = tmp_path / "evil.pth"
    write(path, body)
    with pytest.raises(ValueError, match=rf"evil\.pth was rejected.*'{os.name}\.system'.*run code"):
        read_torch_file(path)
    assert not marker.exists()


def test_malicious_plain_pickle_is_refused(tmp_path):
    marker = tmp_path / "executed"
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(Evil(os.system, (f"touch {marker}",))))
    with pytest.raises(ValueError, match="rejected"):
        read_torch_file(path)
    assert not marker.exists()


@WRITERS
@pytest.mark.parametrize(
    "name",
    (
        "builtins.eval builtins.exec builtins.__import__ __builtin__.apply torch.load a.b.C "
        "subprocess.Popen importlib.import_module torch._utils._rebuild_qtensor"
    ).split(),
)
def test_other_globals_are_refused(tmp_path, write, name):
    write(tmp_path / "x.pth", mapping(x=call(name, op("1"))))
    with pytest.raises(ValueError, match=f"'{name}'"):
        read_torch_file(tmp_path / "x.pth")


@WRITERS
def test_dotted_and_old_style_globals_are_refused(tmp_path, write):
    for body in [
        op("collections") + op("OrderedDict.fromkeys") + b"\x93)R",
        b"(" + op("1") + b"i__builtin__\neval\n",
        b"(c__builtin__\neval\n" + op("1") + b"o",
    ]:
        write(tmp_path / "x.pth", mapping(x=body))
        with pytest.raises(ValueError, match="rejected"):
            read_torch_file(tmp_path / "x.pth")


@WRITERS
@pytest.mark.parametrize(
    "bad",
    [
        tensor(size=(2, 4)),
        tensor(offset=1),
        tensor(offset=-1),
        tensor(stride=(-3, 1)),
        tensor(size=(5, 1), stride=(1 << 60, 1)),  # 4 * 2^60 elements of 4 bytes: 0 modulo 2^64
        tensor(size=(2.0, 3)),
        tensor(size=(True, 3)),
        tensor(stride=(1,)),
        tensor(store=op("0")),
        tensor(store=call("collections.OrderedDict") + op({"key": "0", "dtype": "O"}) + b"b"),
        tensor(kind="Size"),
    ],
)
def test_tensors_outside_their_storage(tmp_path, write, bad):
    write(tmp_path / "x.pth", mapping(w=bad))
    with pytest.raises(ValueError, match=r"x\.pth is truncated or not a checkpoint"):
        read_torch_file(tmp_path / "x.pth")


def test_size_cannot_change_after_the_check(tmp_path):
    # The size is a list, memoised (q), and changed once the tensor exists.
    late = tensor(size="SIZE").replace(op("SIZE"), op([2, 3]) + b"q\xee")
    write_zip(tmp_path / "x.pth", mapping(w=late, x=b"h\xee" + op(9) + b"a"))
    assert read_torch_file(tmp_path / "x.pth").arrays["w"].shape == (2, 3)


def test_placeholders_cannot_be_modified(tmp_path):
    for name in ["__builtin__.getattr", "torch._utils._rebuild_tensor_v2"]:
        target = b"c%s\n%s\n" % tuple(name.encode().rsplit(b".", 1))
        write_zip(
            tmp_path / "x.pth", mapping(w=tensor(), x=target + op((None, {"numpy": 1})) + b"b")
        )
        assert read_torch_file(tmp_path / "x.pth").arrays["w"].shape == (2, 3)


@WRITERS
@pytest.mark.parametrize("keep", [0, 1, 40, -1, -9, -200])
def test_truncated(tmp_path, write, keep):
    write(tmp_path / "x.pth", mapping(w=tensor()))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.pth is truncated or not a checkpoint"):
        read_torch_file(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04", pickle.dumps({"a": 1}), b"\x00" * 99]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_not_a_checkpoint(tmp_path, content, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.{suffix} is truncated or not a checkpoint"):
        read_torch_file(path)


@pytest.mark.parametrize("body", [op([1]), mapping(module=mapping(w=tensor())), tensor()])
def test_not_a_state_dict(tmp_path, body):
    write_zip(tmp_path / "x.pth", body)
    with pytest.raises(ValueError, match=r"not a dict|no tensors"):
        read_torch_file(tmp_path / "x.pth")


def test_missing(tmp_path):
    for name in ["x.pth", "x.safetensors", ""]:
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            read_torch_file(tmp_path / name)


def test_safetensors(tmp_path):
    arrays = {"a.weight": DATA.reshape(2, 3), "b": np.ones((), ml_dtypes.bfloat16)}
    save_file(arrays, tmp_path / "x.safetensors")
    read, meta = read_torch_file(str(tmp_path / "x.safetensors"))
    assert read.keys() == arrays.keys() and meta == {}
    for name in arrays:
        np.testing.assert_array_equal(read[name], arrays[name], strict=True)


# Files that torch itself writes.

ZIP = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def read_back(path, content, new):
    torch = pytest.importorskip("torch")
    torch.save(content, path, _use_new_zipfile_serialization=new)
    return read_torch_file(path).arrays


def check(read, tensors):
    torch = pytest.importorskip("torch")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        value, array = value.detach(), read[name]
        if value.dtype == torch.bfloat16:
            assert array.dtype == ml_dtypes.bfloat16
            value, array = value.float(), array.astype(np.float32)
        np.testing.assert_array_equal(array, value.numpy(), strict=True)


@ZIP
def test_torch_dtypes(tmp_path, new):
    torch = pytest.importorskip("torch")
    kinds = "float16 float32 float64 bfloat16 uint8 int8 int16 int32 int64 bool".split()
    tensors = {kind: (torch.randn(2, 3) * 9).to(getattr(torch, kind)) for kind in kinds}
    check(read_back(tmp_path / "x.pth", tensors, new), tensors)


@ZIP
def test_torch_layouts(tmp_path, new):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 5, 6)
    tensors = OrderedDict(
        base=base,
        shared=base,
        part=base[1:3, ::2],
        transposed=base.permute(2, 0, 1),
        expanded=torch.randn(3, 1).expand(3, 4),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        scalar=torch.tensor(3.5),
        element=base[2, 3, 4],
        empty=torch.zeros(0, 3),
        empty_end=base[4:],
        parameter=torch.nn.Parameter(torch.randn(3)),
    )
    check(read_back(tmp_path / "x.pth", tensors, new), tensors)


@ZIP
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_torch_state_dict(tmp_path, new, wrapper):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    content = state = model.state_dict()
    assert state._metadata
    if wrapper:
        content = {
            wrapper: state,
            "optimizer": optimizer.state_dict(),
            "epoch": 1,
            "meta": {"a": None},
        }
        content |= {"shape": torch.Size([1]), "device": torch.device("cpu"), "array": np.arange(3)}
    check(read_back(tmp_path / "x.pt", content, new), dict(state))


@ZIP
def test_torch_module_is_refused(tmp_path, new):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"'torch\.nn\.modules\.linear\.Linear'"):
        read_back(tmp_path / "x.pth", torch.nn.Linear(2, 2), new)


@ZIP
def test_torch_truncated(tmp_path, new):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.randn(99)}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    content = (tmp_path / "x.pth").read_bytes()
    for size in [10, len(content) // 2, len(content) - 1]:
        (tmp_path / "x.pth").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"x\.pth is truncated"):
            read_torch_file(tmp_path / "x.pth")
