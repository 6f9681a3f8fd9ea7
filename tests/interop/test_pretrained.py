import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from gfl_jax.interop.names import to_torch, torch_name
from gfl_jax.interop.pretrained import find_pretrained
from gfl_jax.interop.pretrained import load_backbone as load_arrays
from gfl_jax.interop.torch_files import read_torch_file

NAME = "timm/resnet50.tv_in1k"


def load_backbone(state, source):
    return load_arrays(state, read_torch_file(find_pretrained(source)).arrays, source)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(width, rngs=rngs)
        self.downsample = nnx.List(
            [
                nnx.Conv(width, width, (1, 1), use_bias=False, rngs=rngs),
                nnx.BatchNorm(width, rngs=rngs),
            ]
        )


class Backbone(nnx.Module):
    def __init__(self, blocks=1, width=4):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, width, (7, 7), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(width, rngs=rngs)
        self.layer1 = nnx.List([Block(width, rngs) for _ in range(blocks)])


def flat(seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    state = nnx.eval_shape(lambda: nnx.state(Backbone(**kwargs)))
    return {k: rng.normal(size=v.shape).astype("f4") for k, v in nnx.to_flat_state(state)}


def write(path, state):
    arrays = {torch_name(p): to_torch(p, v) for p, v in state.items()}
    save_file(arrays | {"fc.weight": np.zeros((9, 4)), "fc.bias": np.zeros(9)}, path)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def hf_hub_download(repo, filename):
        raise ConnectionError(f"no network for {filename} of {repo}")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download)
    )


def test_local_path(tmp_path):
    (tmp_path / "x.pth").touch()
    assert find_pretrained(str(tmp_path / "x.pth")) == tmp_path / "x.pth"


def test_home_is_expanded(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/x.pth").touch()
    assert find_pretrained("~/x.pth") == tmp_path / "home/x.pth"


@pytest.mark.parametrize("name", ["resnet50", "weights/x.pth", "/no/x.safetensors", "../x", ""])
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match="no pretrained file"):
        find_pretrained(name)


def test_no_network_says_what_to_do():
    with pytest.raises(FileNotFoundError) as error:
        find_pretrained(NAME)
    assert isinstance(error.value.__cause__, ConnectionError)
    for part in (
        f"download model.safetensors of {NAME} and pass --model.backbone.pretrained PATH",
        "put it at ~/.cache/gfl_jax/pretrained/timm--resnet50.tv_in1k.safetensors",
    ):
        assert part in str(error.value)


def test_no_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"gfl-jax\[hub\].*put it at ~/\.cache"):
        find_pretrained(NAME)


def test_fetched(monkeypatch):
    hub = SimpleNamespace(hf_hub_download=lambda repo, file: f"/hub/{repo}/{file}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert find_pretrained(NAME) == Path(f"/hub/{NAME}/model.safetensors")


def test_put_by_hand(tmp_path):
    path = tmp_path / "home/.cache/gfl_jax/pretrained/timm--resnet50.tv_in1k.safetensors"
    path.parent.mkdir(parents=True)
    state = flat(seed=1)
    write(path, state)
    assert find_pretrained(NAME) == path
    loaded = load_backbone(flat(), NAME)
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(loaded[key], value, strict=True)


@pytest.mark.parametrize(
    "other,message",
    [
        (dict(blocks=1), r"missing from the file.*layer1\.1\.conv1\.weight"),
        (dict(blocks=3), r"unexpected in the file.*layer1\.2\.conv1\.weight"),
        (
            dict(blocks=2, width=8),
            r"another shape.*conv1\.weight: model \(4, 3, 7, 7\), file \(8, ",
        ),
    ],
)
def test_another_backbone(tmp_path, other, message):
    path = tmp_path / "other.safetensors"
    write(path, flat(**other))
    with pytest.raises(ValueError, match=rf"(?s)other\.safetensors does not fit.*{message}"):
        load_backbone(flat(blocks=2), str(path))


def test_torchvision_names(tmp_path):
    torch = pytest.importorskip("torch")
    state = flat(seed=2)
    arrays = {
        torch_name(path): torch.tensor(to_torch(path, value)) for path, value in state.items()
    }
    assert "layer1.0.downsample.1.running_mean" in arrays
    arrays |= {"bn1.num_batches_tracked": torch.tensor(1), "fc.bias": torch.zeros(3)}
    torch.save(arrays, tmp_path / "x.pth")
    loaded = load_backbone(flat(), str(tmp_path / "x.pth"))
    np.testing.assert_array_equal(loaded["conv1", "kernel"], state["conv1", "kernel"])
