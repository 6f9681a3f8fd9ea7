"""A detector of the PyTorch reference rebuilt here, from what `meta` says and weights by a rule."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from weights import reference_param

from gfl_jax import systems
from gfl_jax.assign import ATSS, FCOS, FoveaBox, MaxIoU
from gfl_jax.data.batch import Sample, pad
from gfl_jax.detectors.box import Deltas, GeneralDistribution, Overlap, SmoothL1
from gfl_jax.detectors.classification import Focal, QualityFocal, SoftmaxMining
from gfl_jax.detectors.inference import Inference
from gfl_jax.interop import stages
from gfl_jax.interop.names import load_state_dict
from gfl_jax.models.fpn import Neck
from gfl_jax.models.network import Backbone, Network
from gfl_jax.priors import RetinaAnchors, SquareAnchors, SSDBoxes


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
    def experiment(self):
        """The system of this project, with the numbers of `meta` in place of its own."""
        config = self.meta["model"]
        head, pixels, test = config["bbox_head"], config["data_preprocessor"], config["test_cfg"]
        base = {
            "GFL": systems.gfl,
            "ATSS": systems.atss,
            "FCOS": systems.fcos_improved if head.get("norm_on_bbox") else systems.fcos,
            "RetinaNet": systems.retinanet,
            "FOVEA": systems.foveabox,
            "SingleStageDetector": systems.ssd512,
        }[config["type"]]
        colours = {
            "mean": tuple(pixels["mean"]),
            "std": tuple(pixels["std"]),
        }
        if config["type"] == "SingleStageDetector":
            model = dataclasses.replace(base.model, **colours)
        else:
            model = self.pyramid_model(base.model, colours)
        inference = Inference(
            score_threshold=test["score_thr"],
            nms_pre=test["nms_pre"],
            nms_iou=test["nms"]["iou_threshold"],
            max_per_image=test["max_per_img"],
            padding_predicts=True,
            clip_margin=base.detector.inference.clip_margin,
            drop_empty=test.get("min_bbox_size", -1) >= 0,
        )
        detector = dataclasses.replace(base.detector, inference=inference, **self.choices(base))
        return dataclasses.replace(base, model=model, detector=detector)

    def pyramid_model(self, model, colours):
        config = self.meta["model"]
        resnet, neck, head = config["backbone"], config["neck"], config["bbox_head"]
        assert resnet["norm_eval"]
        bgr = not config["data_preprocessor"]["bgr_to_rgb"]
        return dataclasses.replace(
            model,
            backbone=Backbone(
                resnet["depth"],
                frozen_stages=resnet["frozen_stages"],
                caffe=resnet["style"] == "caffe",
                train_norm=resnet["norm_cfg"]["requires_grad"],
            ),
            neck=Neck(
                neck["out_channels"],
                extra_from=neck["add_extra_convs"].removeprefix("on_"),
                extra_relu=neck.get("relu_before_extra_convs", False),
            ),
            head=dataclasses.replace(
                model.head,
                width=head["feat_channels"],
                stacked_convs=head["stacked_convs"],
                conv_bias=head.get("conv_bias") is True,
                quality_on="cls"
                if config["type"] == "FCOS" and not head.get("centerness_on_reg")
                else "reg",
            ),
            channel_order="bgr" if bgr else "rgb",
            **colours,
        )

    def choices(self, base):
        """The five choices and loss weights, where `meta` gives their numbers."""
        config = self.meta["model"]
        head, train = config["bbox_head"], config.get("train_cfg") or {}
        overrides = {k.split(".")[-1]: v for k, v in self.meta["overrides"].items()}
        loss, found = head.get("loss_cls", {}), {}
        assert loss.get("loss_weight", 1) == 1
        if loss.get("type") == "FocalLoss":
            found["classification"] = Focal(loss["alpha"], loss["gamma"])
        if "loss_bbox" in head:
            found["box_weight"] = head["loss_bbox"]["loss_weight"]
        if config["type"] in ("GFL", "ATSS"):
            anchors = head["anchor_generator"]
            found["priors"] = SquareAnchors(
                scale=anchors["octave_base_scale"],
                center_offset=anchors.get("center_offset", 0.0),
                strides=tuple(anchors["strides"]),
            )
            found["assigner"] = ATSS(train["assigner"]["topk"])
        if config["type"] == "GFL":
            delta = head.get("delta", overrides.get("delta", 1.0))
            found["box"] = GeneralDistribution(head["reg_max"], delta)
            found["classification"] = QualityFocal(loss["beta"])
            found["dfl_weight"] = head["loss_dfl"]["loss_weight"]
        if config["type"] == "FCOS":
            radius = head.get("center_sample_radius", 1.5) if head.get("center_sampling") else 0.0
            found["assigner"] = FCOS(center_radius=radius)
            found["box_loss"] = Overlap(head["loss_bbox"]["type"].removesuffix("Loss").lower())
        if config["type"] in ("RetinaNet", "SingleStageDetector"):
            found["box"] = Deltas(tuple(head["bbox_coder"]["target_stds"]))
            rule = train["assigner"]
            assert rule["min_pos_iou"] == 0
            first = not rule.get("gt_max_assign_all", True)
            found["assigner"] = MaxIoU(rule["pos_iou_thr"], rule["neg_iou_thr"], first)
        if config["type"] == "RetinaNet":
            anchors = head["anchor_generator"]
            found["priors"] = RetinaAnchors(
                anchors["octave_base_scale"],
                anchors["scales_per_octave"],
                tuple(anchors["ratios"]),
                strides=tuple(anchors["strides"]),
            )
        if config["type"] == "FOVEA":
            strides, edges = head["strides"], head["base_edge_list"]
            assert {edge / stride for edge, stride in zip(edges, strides, strict=True)} == {2}
            ranges = tuple(tuple(ends) for ends in head["scale_ranges"])
            found["assigner"] = FoveaBox(ranges, head["sigma"])
            found["box_loss"] = SmoothL1(head["loss_bbox"]["beta"])
        if config["type"] == "SingleStageDetector":
            anchors = head["anchor_generator"]
            found["priors"] = SSDBoxes(
                anchors["input_size"],
                smallest=anchors["basesize_ratio_range"][0],
                largest=anchors["basesize_ratio_range"][1],
                ratios=tuple(tuple(ratios) for ratios in anchors["ratios"]),
                strides=tuple(anchors["strides"]),
            )
            found["classification"] = SoftmaxMining(train["neg_pos_ratio"])
            found["box_loss"] = SmoothL1(train["smoothl1_beta"])
        return found

    @property
    def detector(self):
        return self.experiment.detector

    @functools.cached_property
    def network(self):
        classes = self.meta["model"]["bbox_head"]["num_classes"]
        return Network(self.experiment.model, self.detector.predicts(classes))

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
        loaded, mismatch = load_state_dict(
            self.network.by_path(abstract), self.state_dict, ignore=[r"bbox_head\.integral"]
        )
        mismatch.raise_if_any(self.meta["case"])
        return self.network.replaced(abstract, loaded)

    @functools.cached_property
    def batch(self):
        count = len(self.keys("images."))
        samples = [
            Sample(self[f"images.{i}"], (1.0, 1.0), self[f"boxes.{i}"], self[f"labels.{i}"])
            for i in range(count)
        ]
        return jax.tree.map(jnp.asarray, pad(samples))

    @functools.cached_property
    def stages(self):
        batch = jax.tree.map(np.asarray, self.batch)
        return stages.stages(self.network, self.detector, self.variables, batch)

    @functools.cached_property
    def gradients(self):
        return stages.gradients(self.network, self.detector, self.variables, self.batch)
