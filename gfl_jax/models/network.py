"""The whole network as pure functions of flat dictionaries of arrays.

Parameters are dictionaries from dotted paths, as the PyTorch reference names its modules
('backbone.layer1.0.conv1.kernel'), to arrays. Three of them make up a network: `params`, which the
optimiser trains, `frozen`, pretrained stages that receive neither gradient nor weight decay, and
`stats`, BatchNorm statistics.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gfl_jax.models.fpn import FPN, Neck
from gfl_jax.models.heads import DenseHead, Head, Outputs, Predicts
from gfl_jax.models.layers import Constant, Norm
from gfl_jax.models.resnet import ResNet, out_features
from gfl_jax.models.ssd import SSD, SSDModel

Arrays = dict[str, jax.Array]


class Variables(NamedTuple):
    """All arrays of a network: trained parameters, frozen parameters, BatchNorm statistics."""

    params: Arrays
    frozen: Arrays
    stats: Arrays


@dataclasses.dataclass(frozen=True)
class Backbone:
    """depth: ResNet-18, 34, 50 or 101.  width: channels of its first stage, 64 in the paper.

    norm: frozen_bn for pretrained weights; bn, sync_bn or gn for training from random ones.
    frozen_stages: -1 none, 0 the stem, 1 stem and first stage, ... : no gradient, no weight decay.
    pretrained: a .pth or .safetensors file, or a Hugging Face name such as timm/resnet50.tv_in1k.
    caffe: whether bottlenecks stride on their first 1x1, as the weights from Detectron do.
    train_norm: whether scales and biases of norm layers are trained.
    remat: whether the backward pass computes the inside of each residual block again: less memory,
        more time.
    """

    depth: int = 50
    width: int = 64
    norm: Norm = "frozen_bn"
    frozen_stages: int = 1
    pretrained: str = ""
    caffe: bool = False
    train_norm: bool = True
    remat: bool = False

    def __post_init__(self):
        if not -1 <= self.frozen_stages <= 4:
            raise ValueError(f"backbone.frozen_stages is {self.frozen_stages}; it must be -1 to 4")
        if self.norm in ("bn", "sync_bn") and self.frozen_stages >= 0:
            raise ValueError(
                f"backbone.norm {self.norm!r} trains the statistics of every stage; "
                f"backbone.frozen_stages is {self.frozen_stages}: set it to -1, or norm to "
                "'frozen_bn'"
            )


@dataclasses.dataclass(frozen=True)
class Model:
    """The network: ResNet, pyramid and head.

    dtype: of the convolutions; parameters, norm statistics and head outputs are float32 always.
    mean, std: of pixels, 0 to 255, in `channel_order`, which is that of the pretrained weights.
    """

    backbone: Backbone = Backbone()
    neck: Neck = Neck()
    head: Head = Head()
    dtype: Literal["float32", "bfloat16"] = "float32"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    @property
    def pretrained(self) -> str:
        """That of the backbone."""
        return self.backbone.pretrained

    def is_frozen(self, name: str) -> bool:
        """Whether a parameter, by its dotted path, is of a frozen stage or norm layer."""
        stages = self.backbone.frozen_stages
        prefixes = ["conv1.", "bn1."] * (stages >= 0) + [f"layer{i + 1}." for i in range(stages)]
        if name.startswith(tuple(f"backbone.{prefix}" for prefix in prefixes)):
            return True
        norm = re.match(r"backbone\.(.*\.)?(bn\d|downsample\.1)\.", name)
        return bool(norm) and not self.backbone.train_norm


class DenseNetwork(nnx.Module):
    """Backbone, neck and head; images normalised, P3..P7 inside."""

    def __init__(self, model: Model, predicts: Predicts, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(model.dtype)
        resnet = model.backbone
        self.backbone = ResNet(
            resnet.depth,
            width=resnet.width,
            norm=resnet.norm,
            caffe=resnet.caffe,
            remat=resnet.remat,
            dtype=dtype,
            rngs=rngs,
        )
        features = out_features(resnet.depth, resnet.width)
        self.neck = FPN(features, model.neck, dtype=dtype, rngs=rngs)
        self.bbox_head = DenseHead(model.neck.width, predicts, model.head, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Outputs:
        return self.bbox_head(self.neck(self.backbone(images)))


class Network:
    """`init` makes the arrays, `apply` is the pure forward pass over them."""

    def __init__(self, model: Model | SSDModel, predicts: Predicts):
        """Describe the network; nothing is computed yet.

        Args:
            model: sizes.
            predicts: what a detector needs of it, `Detector.predicts(num_classes)`.
        """
        self.model = model
        module: Any = SSD if isinstance(model, SSDModel) else DenseNetwork
        self._build = functools.partial(module, model, predicts)
        network = nnx.eval_shape(lambda: self._build(rngs=nnx.Rngs(0)))
        self.paths = [path for path, _ in nnx.to_flat_state(nnx.state(network))]
        network.train()
        self._train_graph = nnx.split(network)[0]
        network.eval()
        self._eval_graph = nnx.split(network)[0]

    def init(self, seed: int) -> Variables:
        """Random weights."""
        network = self._build(rngs=nnx.Rngs(seed))
        params, frozen, stats = (
            _flat(nnx.state(network, kind)) for kind in (nnx.Param, Constant, nnx.BatchStat)
        )
        frozen |= {name: params.pop(name) for name in list(params) if self.model.is_frozen(name)}
        return Variables(params, frozen, stats)

    def by_path(self, variables: Variables) -> dict[tuple, jax.Array]:
        """The arrays by their paths in the Flax module, such as ('backbone', 'conv1', 'kernel')."""
        arrays = {**variables.params, **variables.frozen, **variables.stats}
        return {path: arrays[_dotted(path)] for path in self.paths}

    def replaced(self, variables: Variables, arrays: Mapping[tuple, Any]) -> Variables:
        """The variables with other arrays at some paths."""
        named = {_dotted(path): jnp.asarray(array) for path, array in arrays.items()}
        return Variables(*({k: named.get(k, v) for k, v in part.items()} for part in variables))

    def apply(
        self,
        variables: Variables,
        images: Array,
        sizes: Int[Array, "b 2"],
        *,
        train: bool,
    ) -> tuple[Outputs, Arrays]:
        """Forward pass.

        Args:
            variables: all arrays.
            images: uint8 RGB canvases [b, h, w, 3], sides multiples of 32.
            sizes: height and width of the image on its canvas; what lies outside is padding.
            train: whether norm layers of kind 'bn' use the batch's statistics.

        Returns:
            The head's outputs and the new statistics (the old ones unless training).
        """
        network = self.module(variables, train=train)
        outputs = network(self.normalize(images, sizes))
        return outputs, _flat(nnx.state(network, nnx.BatchStat))

    def module(self, variables: Variables, *, train: bool) -> DenseNetwork | SSD:
        """The Flax module with these arrays, for a look inside: backbone, neck and bbox_head."""
        state = nnx.from_flat_state(list(self.by_path(variables).items()))
        return nnx.merge(self._train_graph if train else self._eval_graph, state)

    @jax.named_scope("normalize")
    def normalize(self, images: Array, sizes: Int[Array, "b 2"]) -> Float[Array, "b h w 3"]:
        """(x - mean) / std in float32, then zero in the padding, as the reference pads after it."""
        x = images[..., ::-1] if self.model.channel_order == "bgr" else images
        x = (x.astype(jnp.float32) - jnp.array(self.model.mean)) / jnp.array(self.model.std)
        rows = jnp.arange(images.shape[1])[None, :, None, None] < sizes[:, 0, None, None, None]
        columns = jnp.arange(images.shape[2])[None, None, :, None] < sizes[:, 1, None, None, None]
        return jnp.where(rows & columns, x, 0.0)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _flat(state: nnx.State) -> Arrays:
    return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(state)}
