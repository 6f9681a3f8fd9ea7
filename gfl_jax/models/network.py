"""The whole network as pure functions of flat dictionaries of arrays.

The dictionaries map dotted paths, which follow the module names of the PyTorch reference
('backbone.layer1.0.conv1.kernel'), to arrays.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from gfl_jax.models.fpn import FPN, Neck
from gfl_jax.models.heads import DenseHead, Head, Outputs, OutputSpec
from gfl_jax.models.layers import Constant
from gfl_jax.models.resnet import Backbone, ResNet, out_features
from gfl_jax.models.ssd import SSDModel

Arrays = dict[str, jax.Array]


class Variables(NamedTuple):
    """All arrays of a network, by dotted path.

    Attributes:
        params: Trained by the optimiser.
        frozen: Never changed: parameters of frozen stages, statistics of frozen BatchNorms.
        stats: Running statistics of the norm layers 'bn' and 'sync_bn'.
    """

    params: Arrays
    frozen: Arrays
    stats: Arrays


@dataclasses.dataclass(frozen=True)
class Model:
    """The network: ResNet, pyramid and head.

    Attributes:
        backbone: The ResNet.
        neck: The feature pyramid.
        head: The head, shared by all levels.
        dtype: Of convolutions and activations. Parameters, the arithmetic of norm layers and the
            head's outputs are always float32.
        mean: Of the pixels (0 to 255), in `channel_order`.
        std: Of the pixels (0 to 255), in `channel_order`.
        channel_order: The one that the pretrained weights expect.
        init_from: Trained detector that a new run begins with: a work directory or folder of
            checkpoints, local or gs://, or a .pth or .safetensors file in mmdetection's names. All
            but its class outputs are taken over, and of these the classes that have the same name.
    """

    backbone: Backbone = Backbone()
    neck: Neck = Neck()
    head: Head = Head()
    dtype: Literal["float32", "bfloat16"] = "float32"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    init_from: str = ""

    backbone_flag = "--model.backbone"

    @property
    def pretrained(self) -> str:
        """`pretrained` of the backbone."""
        return self.backbone.pretrained

    @property
    def cls_convs(self) -> list[str]:
        """Paths within `bbox_head` of the convolutions that predict class logits."""
        return [f"{self.head.names}_cls"]

    def build(self, predicts: OutputSpec, *, rngs: nnx.Rngs) -> "DenseNetwork":
        """The network, with random weights."""
        return DenseNetwork(self, predicts, rngs=rngs)

    def with_pretrained(self, source: str) -> "Model":
        """The same model with a pretrained backbone from a file or a name."""
        backbone = dataclasses.replace(self.backbone, pretrained=source)
        return dataclasses.replace(self, backbone=backbone)

    def is_frozen(self, name: str) -> bool:
        """Whether the parameter with this dotted path belongs to a frozen stage or norm."""
        stages = self.backbone.frozen_stages
        frozen = ["conv1", "bn1"] if stages >= 0 else []
        frozen += [f"layer{i + 1}" for i in range(stages)]
        if name.startswith(tuple(f"backbone.{module}." for module in frozen)):
            return True
        norm = re.match(r"backbone\.(.*\.)?(bn\d|downsample\.1)\.", name)
        return bool(norm) and not self.backbone.train_norm

    def random_backbone_problem(self) -> str:
        """Why the backbone should not start from random weights; empty if it may."""
        norm, stages = self.backbone.norm, self.backbone.frozen_stages
        if norm != "frozen_bn" and stages < 0:
            return ""
        return (
            f"norm {norm!r} with frozen_stages {stages} needs a pretrained backbone: name one with "
            "model.backbone.pretrained, or set norm to 'bn' or 'gn' and frozen_stages to -1"
        )

    def small(self, side: int) -> tuple["Model", dict[str, Any]]:
        """The same choices at a size that two CPU cores train from random weights in minutes.

        Towers have GroupNorm, even those of RetinaNet and FoveaBox: without it they learn nothing
        from random weights in this time.

        Args:
            side: The smaller side of the images, in pixels.

        Returns:
            The model, and the fields of the detector that change with it.
        """
        model = Model(
            backbone=Backbone(depth=18, width=32, norm="bn", frozen_stages=-1),
            neck=dataclasses.replace(self.neck, width=64),
            head=dataclasses.replace(self.head, width=64, stacked_convs=2, norm="gn"),
        )
        return model, {}


AnyModel = Model | SSDModel
"""The families of networks; add new ones here, with the same methods."""


class DenseNetwork(nnx.Module):
    """Backbone, neck and head: normalised images in, outputs on P3..P7."""

    def __init__(self, model: Model, predicts: OutputSpec, *, rngs: nnx.Rngs):
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

    def __init__(self, model: AnyModel, predicts: OutputSpec):
        """Describe the network; nothing is computed yet.

        Args:
            model: Its family and sizes.
            predicts: The outputs that a detector needs, `Detector.predicts(num_classes)`.
        """
        self.model = model
        self._predicts = predicts
        network = nnx.eval_shape(lambda: model.build(predicts, rngs=nnx.Rngs(0)))
        self.paths = [path for path, _ in nnx.to_flat_state(nnx.state(network))]
        network.train()
        self._train_graph = nnx.split(network)[0]
        network.eval()
        self._eval_graph = nnx.split(network)[0]

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> "Network":
        """The same network with convolutions and activations of another dtype."""
        return Network(dataclasses.replace(self.model, dtype=dtype), self._predicts)

    def init(self, seed: int) -> Variables:
        """Random weights."""
        network = self.model.build(self._predicts, rngs=nnx.Rngs(seed))
        params, frozen, stats = (
            _flat(nnx.state(network, kind)) for kind in (nnx.Param, Constant, nnx.BatchStat)
        )
        frozen |= {name: params.pop(name) for name in list(params) if self.model.is_frozen(name)}
        return Variables(params, frozen, stats)

    def by_path(self, variables: Variables) -> dict[tuple, Array]:
        """The arrays by their paths in the Flax module, such as ('backbone', 'conv1', 'kernel')."""
        arrays = {**variables.params, **variables.frozen, **variables.stats}
        return {path: arrays[_dotted(path)] for path in self.paths}

    def replaced(self, variables: Variables, arrays: Mapping[tuple, Any]) -> Variables:
        """The variables with the arrays at some paths replaced."""
        named = {_dotted(path): jnp.asarray(array) for path, array in arrays.items()}
        return Variables(*({k: named.get(k, v) for k, v in part.items()} for part in variables))

    def apply(
        self,
        variables: Variables,
        images: UInt8[Array, "b h w 3"],
        sizes: Int[Array, "b 2"],
        *,
        train: bool,
    ) -> tuple[Outputs, Arrays]:
        """Forward pass.

        Args:
            variables: All arrays.
            images: RGB canvases whose sides are multiples of 32.
            sizes: Height and width of the image on its canvas, in pixels; the rest is padding.
            train: Whether norm layers of kind 'bn' and 'sync_bn' use the batch's statistics.

        Returns:
            The head's outputs, and `Variables.stats` after this batch (unchanged unless training).
        """
        network = self.module(variables, train=train)
        outputs = network(self.normalize(images, sizes))
        return outputs, _flat(nnx.state(network, nnx.BatchStat))

    def module(self, variables: Variables, *, train: bool) -> Any:
        """The Flax module with these arrays, to call backbone, neck and bbox_head one by one."""
        state = nnx.from_flat_state(list(self.by_path(variables).items()))
        return nnx.merge(self._train_graph if train else self._eval_graph, state)

    @jax.named_scope("normalize")
    def normalize(
        self, images: UInt8[Array, "b h w 3"], sizes: Int[Array, "b 2"]
    ) -> Float[Array, "b h w 3"]:
        """(x - mean) / std in float32, then zeros in the padding: the reference pads last."""
        x = images[..., ::-1] if self.model.channel_order == "bgr" else images
        x = (x.astype(jnp.float32) - jnp.array(self.model.mean)) / jnp.array(self.model.std)
        rows = jnp.arange(images.shape[1])[None, :, None, None] < sizes[:, 0, None, None, None]
        columns = jnp.arange(images.shape[2])[None, None, :, None] < sizes[:, 1, None, None, None]
        return jnp.where(rows & columns, x, 0.0)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _flat(state: nnx.State) -> Arrays:
    return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(state)}
