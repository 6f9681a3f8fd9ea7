"""A detector of the PyTorch reference rebuilt here, from what `meta` says and weights by a rule."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from weights import reference_param

from gfl_jax.assign import ATSS
from gfl_jax.detectors.dense import Detector, GeneralDistribution, QualityFocal
from gfl_jax.detectors.postprocess import Inference
from gfl_jax.interop import stages
from gfl_jax.interop.names import load_state_dict
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.priors import SquareAnchors


@functools.cache
def read_meta(file):
    """The `meta` of an .npz, empty if it has none."""
    with np.load(file) as case:
        return json.loads(str(case["meta"])) if "meta" in case else {}


class DetectorCase:
    """A detector, its images, and what both programs make of them."""

    def __init__(self, file):
        self.stored, self.meta = np.load(file), read_meta(file)

    def __getitem__(self, key):
        return self.stored[key]

    def keys(self, prefix):
        return [key for key in self.stored.files if key.startswith(prefix)]

    @functools.cached_property
    def model(self):
        config = self.meta["model"]
        pixels, resnet = config["data_preprocessor"], config["backbone"]
        head = config["bbox_head"]
        assert pixels["bgr_to_rgb"] and pixels["pad_size_divisor"] == 32
        assert resnet["style"] == "pytorch" and resnet["norm_eval"]
        return Model(
            Backbone(resnet["depth"], frozen_stages=resnet["frozen_stages"]),
            fpn_width=config["neck"]["out_channels"],
            head_width=head["feat_channels"],
            stacked_convs=head["stacked_convs"],
            mean=tuple(pixels["mean"]),
            std=tuple(pixels["std"]),
        )

    @functools.cached_property
    def detector(self):
        head, test = self.meta["model"]["bbox_head"], self.meta["model"]["test_cfg"]
        overrides = {k.split(".")[-1]: v for k, v in self.meta["overrides"].items()}
        anchors = head["anchor_generator"]
        assert head["loss_cls"]["loss_weight"] == 1
        return Detector(
            priors=SquareAnchors(
                scale=anchors["octave_base_scale"],
                center_offset=anchors.get("center_offset", 0.0),
                strides=tuple(anchors["strides"]),
            ),
            assigner=ATSS(self.meta["model"]["train_cfg"]["assigner"]["topk"]),
            box=GeneralDistribution(
                head["reg_max"], head.get("delta", overrides.get("delta", 1.0))
            ),
            classification=QualityFocal(head["loss_cls"]["beta"]),
            box_weight=head["loss_bbox"]["loss_weight"],
            dfl_weight=head["loss_dfl"]["loss_weight"],
            inference=Inference(
                score_threshold=test["score_thr"],
                nms_pre=test["nms_pre"],
                nms_iou=test["nms"]["iou_threshold"],
                max_per_image=test["max_per_img"],
                padding_predicts=True,
            ),
        )

    @functools.cached_property
    def network(self):
        classes = self.meta["model"]["bbox_head"]["num_classes"]
        return Network(self.model, classes, self.detector.box.channels)

    @functools.cached_property
    def state_dict(self):
        names, shapes = self["param.names"], self["param.shapes"]
        seed, rule = self.meta["seed"], self.meta["rule"]
        return {
            str(name): reference_param(str(name), tuple(json.loads(str(shape))), seed, **rule)
            for name, shape in zip(names, shapes, strict=True)
        }

    @functools.cached_property
    def variables(self):
        abstract = jax.eval_shape(lambda: self.network.init(0))
        loaded, report = load_state_dict(
            self.network.by_path(abstract), self.state_dict, ignore=[r"bbox_head\.integral"]
        )
        report.raise_if_any(self.meta["case"])
        return self.network.replaced(abstract, loaded)

    @functools.cached_property
    def batch(self):
        count = len(self.keys("images."))
        arrays = [[self[f"{k}.{i}"] for i in range(count)] for k in ("images", "boxes", "labels")]
        return jax.tree.map(jnp.asarray, stages.make_batch(*arrays))

    @functools.cached_property
    def stages(self):
        batch = jax.tree.map(np.asarray, self.batch)
        return stages.stages(self.network, self.detector, self.variables, batch)

    @functools.cached_property
    def gradients(self):
        return stages.gradients(self.network, self.detector, self.variables, self.batch)
