import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gfl_jax.interop.names import Mismatch, from_torch, load_state_dict, to_torch, torch_name


class Scale(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.array(1.0))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 5), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.layer1 = nnx.List([nnx.Conv(4, 6, (1, 1), feature_group_count=2, rngs=rngs)])
        self.downsample = nnx.Sequential(
            nnx.Conv(4, 4, (1, 1), rngs=rngs), nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        )
        self.scales = nnx.List([Scale(), Scale()])
        self.fc = nnx.Linear(4, 5, rngs=rngs)


def abstract():
    return dict(nnx.to_flat_state(nnx.eval_shape(lambda: nnx.state(Model(nnx.Rngs(0))))))


def flat():
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=v.shape).astype(np.float32) for path, v in abstract().items()}


@pytest.mark.parametrize(
    "path,name",
    [
        (("backbone", "layer1", 0, "conv1", "kernel"), "backbone.layer1.0.conv1.weight"),
        (("bn1", "scale"), "bn1.weight"),
        (("bn1", "bias"), "bn1.bias"),
        (("bn1", "mean"), "bn1.running_mean"),
        (("bn1", "var"), "bn1.running_var"),
        (("bbox_head", "scales", 3, "scale"), "bbox_head.scales.3.scale"),
        (("layer1", 0, "downsample", "layers", 1, "scale"), "layer1.0.downsample.1.weight"),
        (("a", "layers", "b", "kernel"), "a.layers.b.weight"),
        (("backbone", "features", "21", "kernel"), "backbone.features.21.weight"),
        (("neck", "l2_norm", "scale"), "neck.l2_norm.weight"),
        (("bbox_head", "cls_convs", 3, 0, "bias"), "bbox_head.cls_convs.3.0.bias"),
        (("project",), "project"),
    ],
)
def test_torch_name(path, name):
    assert torch_name(path) == name


def test_names_and_layouts_are_those_of_torch():
    nn = pytest.importorskip("torch.nn")

    class TorchScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(nn.init.torch.tensor(1.0))

    model = nn.ModuleDict(
        dict(
            conv1=nn.Conv2d(3, 4, (3, 5), bias=False),
            bn1=nn.BatchNorm2d(4),
            layer1=nn.ModuleList([nn.Conv2d(4, 6, 1, groups=2)]),
            downsample=nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)),
            scales=nn.ModuleList([TorchScale(), TorchScale()]),
            fc=nn.Linear(4, 5),
        )
    )
    torch_dict = {name: value.numpy() for name, value in model.state_dict().items()}
    loaded, mismatch = load_state_dict(abstract(), torch_dict)
    assert mismatch == Mismatch()
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 7)).astype(np.float32)
    expected = model["conv1"](nn.init.torch.tensor(x)).detach().numpy()
    kernel, layout = loaded["conv1", "kernel"], ("NCHW", "HWIO", "NCHW")
    actual = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_round_trip_is_exact():
    state = flat()
    torch_dict = {torch_name(path): to_torch(path, value) for path, value in state.items()}
    assert len(torch_dict) == len(state)
    assert torch_dict["conv1.weight"].shape == (4, 3, 3, 5)
    assert torch_dict["layer1.0.weight"].shape == (6, 2, 1, 1)
    assert torch_dict["scales.1.scale"].shape == ()
    assert all(value.flags.c_contiguous for value in torch_dict.values())
    torch_dict["bn1.num_batches_tracked"] = np.array(7)
    loaded, mismatch = load_state_dict(abstract(), torch_dict)
    assert mismatch == Mismatch()
    mismatch.raise_if_any("nothing")
    assert loaded.keys() == state.keys()
    for path, value in state.items():
        np.testing.assert_array_equal(loaded[path], value, strict=True)


def test_from_torch_checks_the_shape():
    path = ("conv1", "kernel")
    array = np.zeros((4, 3, 1, 2))
    assert from_torch(path, array, (1, 2, 3, 4)).shape == (1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        from_torch(path, array, (4, 3, 1, 2))


def test_casts_to_the_dtype_of_the_model():
    state = {("bias",): jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    loaded, _ = load_state_dict(state, {"bias": np.ones(3, np.float16)})
    assert loaded["bias",].dtype == jnp.bfloat16


def test_mismatches_are_reported():
    state = flat()
    torch_dict = {torch_name(path): to_torch(path, value) for path, value in state.items()}
    del torch_dict["bn1.running_var"]
    torch_dict["extra.weight"] = np.zeros(2)
    torch_dict["conv1.weight"] = np.zeros((4, 3, 1, 1), np.float32)
    loaded, mismatch = load_state_dict(state, torch_dict)
    assert mismatch.missing == ("bn1.running_var",)
    assert mismatch.unexpected == ("extra.weight",)
    assert mismatch.misshapen == (("conv1.weight", (4, 3, 3, 5), (4, 3, 1, 1)),)
    assert loaded["conv1", "kernel"] is state["conv1", "kernel"]
    with pytest.raises(ValueError) as error:
        mismatch.raise_if_any("x.pth")
    message = str(error.value)
    for part in ("x.pth", "bn1.running_var", "extra.weight", "(4, 3, 3, 5), file (4, 3, 1, 1)"):
        assert part in message
    ignore = (r"bn1\.running_var$", "extra", "conv1")
    loaded, mismatch = load_state_dict(state, torch_dict, ignore=iter(ignore))
    assert mismatch == Mismatch()
    assert loaded["conv1", "kernel"] is state["conv1", "kernel"]
