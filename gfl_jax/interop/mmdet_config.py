"""The mmdetection model config of a detector of this project.

It works without jax: nothing is imported, and experiments are plain dictionaries as
`gfl_jax.config.to_dict` writes them.
"""

_SHARED = {
    "model.backbone.norm": ("frozen_bn", "bn", "sync_bn"),
    "model.head.conv_bias": (False,),
    "detector.counting": ("image",),
    "detector.inference.clip_margin": (0,),
}
_OVERLAP = {
    "model.head.scales": (True,),
    "model.head.quality_on": ("reg",),
    "detector.box_loss": ("Overlap",),
    "detector.min_weight": (1,),
}
_SMOOTH = {
    "model.head.scales": (False,),
    "detector.box_loss": ("SmoothL1",),
    "detector.quality": ({"kind": "NoQuality", "weighting": "none"},),
}
_CENTERNESS = {"detector.quality": ({"kind": "QualityBranch", "measure": "centerness"},)}
_POINTS = {"detector.priors": ("Points",), "detector.priors.trains_padding": (True,)}

FIXED: dict[str, dict[str, tuple]] = {
    "GFLHead": {
        **_SHARED,
        **_OVERLAP,
        "detector.priors": ("SquareAnchors",),
        "detector.assigner": ("ATSS",),
        "detector.box": ("GeneralDistribution",),
        "detector.box.delta": (1,),
        "detector.quality": ({"kind": "JointQuality", "weighting": "predicted", "measure": "iou"},),
        "detector.classification": ("QualityFocal",),
    },
    "ATSSHead": {
        **_SHARED,
        **_OVERLAP,
        **_CENTERNESS,
        "detector.priors": ("SquareAnchors",),
        "detector.assigner": ("ATSS",),
        "detector.box": ("Deltas",),
        "detector.classification": ("Focal",),
    },
    "FCOSHead": {
        **_SHARED,
        **_OVERLAP,
        **_CENTERNESS,
        **_POINTS,
        "model.head.conv_bias": (False, True),
        "model.head.quality_on": ("reg", "cls"),
        "detector.assigner": ("FCOS",),
        "detector.box": (
            {"kind": "Distances", "activation": "exp", "unit": "pixels"},
            {"kind": "Distances", "activation": "relu", "unit": "strides"},
        ),
        "detector.classification": ("Focal",),
        "detector.counting": ("batch",),
        "detector.min_weight": (1e-6,),
    },
    "RetinaHead": {
        **_SHARED,
        **_SMOOTH,
        "detector.priors": ("RetinaAnchors", "SquareAnchors"),
        "detector.assigner": ("MaxIoU",),
        "detector.box": ("Deltas",),
        "detector.classification": ("Focal",),
    },
    "FoveaHead": {
        **_SHARED,
        **_SMOOTH,
        **_POINTS,
        "model.head.conv_bias": (False, True),
        "detector.assigner": ("FoveaBox",),
        "detector.box": ("LogDistances",),
        "detector.box.limit": (16,),
        "detector.classification": ("Focal",),
        "detector.counting": ("extra",),
        "detector.inference.clip_margin": (1,),
    },
    "SSDHead": {
        **_SHARED,
        **_SMOOTH,
        "model.width": (64,),
        "detector.priors": ("SSDBoxes",),
        "detector.priors.input_size": (512,),
        "detector.priors.first": (0.04,),
        "detector.priors.smallest": (0.1,),
        "detector.assigner": ("MaxIoU",),
        "detector.box": ("Deltas",),
        "detector.box_weight": (1,),
        "detector.classification": ("SoftmaxMining",),
    },
}
"""Fields of the experiment for which mmdetection's heads support only these values; for a
dataclass, its kind or all of it. Numbers that are not listed here may have any value."""


def head_type(config):
    """The class of mmdetection's head for an experiment."""
    names = config["model"].get("head", {"names": "ssd"})["names"]
    if names == "conv":
        return "FoveaHead" if config["detector"]["box"]["kind"] == "LogDistances" else "FCOSHead"
    return {"gfl": "GFLHead", "atss": "ATSSHead", "retina": "RetinaHead", "ssd": "SSDHead"}[names]


def differences(config, fixed):
    """Fields of an experiment that differ from `fixed`, as text; absent fields do not count."""
    found = []
    for field, allowed in fixed.items():
        value = config
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        kind = value.get("kind") if isinstance(value, dict) else None
        if value is not None and value not in allowed and kind not in allowed:
            found.append(f"{field} {_words(value)} (only {' or '.join(map(_words, allowed))})")
    return found


def _words(value):
    if not isinstance(value, dict):
        return str(value)
    fields = ", ".join(f"{name}={field}" for name, field in value.items() if name != "kind")
    return f"{value['kind']}({fields})"


def model_config(config):
    """The detector's config in mmdetection.

    Raises:
        ValueError: it has no such detector; the message names every choice without a counterpart.
    """
    model, detector = config["model"], config["detector"]
    head = head_type(config)
    if unknown := differences(config, FIXED[head]):
        raise ValueError(f"mmdetection's {head} has no counterpart for {'; '.join(unknown)}")
    inference, assigner = detector["inference"], detector["assigner"]
    test = dict(
        nms_pre=inference["nms_pre"],
        score_thr=inference["score_threshold"],
        nms=dict(type="nms", iou_threshold=inference["nms_iou"]),
        max_per_img=inference["max_per_image"],
    )
    if inference["drop_empty"]:
        test["min_bbox_size"] = 0
    train = dict(allowed_border=-1, pos_weight=-1, debug=False)
    if assigner["kind"] == "ATSS":
        train["assigner"] = dict(type="ATSSAssigner", topk=assigner["topk"])
    if assigner["kind"] == "MaxIoU":
        train["assigner"] = dict(
            type="MaxIoUAssigner",
            pos_iou_thr=assigner["positive"],
            neg_iou_thr=assigner["negative"],
            min_pos_iou=0.0,
            ignore_iof_thr=-1,
            gt_max_assign_all=not assigner["force_first"],
        )
        train["sampler"] = dict(type="PseudoSampler")
    if head == "SSDHead":
        train["smoothl1_beta"] = detector["box_loss"]["beta"]
        negatives = detector["classification"]["negatives"]
        if negatives != int(negatives):
            raise ValueError(f"mmdetection's SSDHead takes only integer negatives, not {negatives}")
        train["neg_pos_ratio"] = int(negatives)
    layers = _ssd_layers(model) if head == "SSDHead" else _pyramid_layers(model)
    layers["bbox_head"] |= dict(type=head, num_classes=config["num_classes"], **_choices(config))
    return dict(
        type="SingleStageDetector",
        data_preprocessor=dict(
            type="DetDataPreprocessor",
            mean=model["mean"],
            std=model["std"],
            bgr_to_rgb=model.get("channel_order", "rgb") == "rgb",
            pad_size_divisor=32,
        ),
        **layers,
        train_cfg=train,
        test_cfg=test,
    )


def _pyramid_layers(model):
    backbone, neck, head = model["backbone"], model["neck"], model["head"]
    expansion = 4 if backbone["depth"] >= 50 else 1
    groups = dict(type="GN", num_groups=32, requires_grad=True)
    return dict(
        backbone=dict(
            type="ResNet",
            depth=backbone["depth"],
            base_channels=backbone["width"],
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            frozen_stages=backbone["frozen_stages"],
            norm_cfg=dict(type="BN", requires_grad=backbone["train_norm"]),
            norm_eval=True,
            style="caffe" if backbone["caffe"] else "pytorch",
        ),
        neck=dict(
            type="FPN",
            in_channels=[backbone["width"] * 2**i * expansion for i in range(4)],
            out_channels=neck["width"],
            start_level=1,
            add_extra_convs=f"on_{neck['extra_from']}",
            relu_before_extra_convs=neck["extra_relu"],
            num_outs=5,
        ),
        bbox_head=dict(
            in_channels=neck["width"],
            feat_channels=head["width"],
            stacked_convs=head["stacked_convs"],
            norm_cfg=groups if head["norm"] == "gn" else None,
        ),
    )


def _ssd_layers(model):
    extra = model["extra_levels"]
    channels = (512, 1024, 512) + (256,) * (extra - 1)
    return dict(
        backbone=dict(
            type="SSDVGG",
            depth=16,
            with_last_pool=False,
            ceil_mode=True,
            out_indices=(3, 4),
            out_feature_indices=(22, 34),
        ),
        neck=dict(
            type="SSDNeck",
            in_channels=channels[:2],
            out_channels=channels,
            level_strides=(2,) * (extra - 1) + (1,),
            level_paddings=(1,) * extra,
            last_kernel_size=4,
        ),
        bbox_head=dict(in_channels=channels),
    )


def _choices(config):
    """A detector's five choices as arguments of a head."""
    head, detector = config["model"].get("head", {}), config["detector"]
    priors, assigner, box = detector["priors"], detector["assigner"], detector["box"]
    classification, box_loss = detector["classification"], detector["box_loss"]
    strides = priors["strides"]
    found = {}
    if priors["kind"] == "Points":
        found["strides"] = strides
        found["conv_bias"] = True if head["conv_bias"] else "auto"
    elif priors["kind"] == "SSDBoxes":
        found["anchor_generator"] = dict(
            type="SSDAnchorGenerator",
            scale_major=False,
            input_size=priors["input_size"],
            basesize_ratio_range=(priors["smallest"], priors["largest"]),
            strides=strides,
            ratios=priors["ratios"],
        )
    else:
        square = priors["kind"] == "SquareAnchors"
        found["anchor_generator"] = dict(
            type="AnchorGenerator",
            ratios=[1.0] if square else priors["ratios"],
            octave_base_scale=priors["scale" if square else "octave_base"],
            scales_per_octave=1 if square else priors["scales_per_octave"],
            strides=strides,
            center_offset=priors["center_offset"],
        )

    if assigner["kind"] == "FCOS":
        found["regress_ranges"] = assigner["ranges"]
        found["center_sampling"] = assigner["center_radius"] > 0
        found["center_sample_radius"] = assigner["center_radius"]
        found["centerness_on_reg"] = head["quality_on"] == "reg"
    if assigner["kind"] == "FoveaBox":
        found["scale_ranges"] = assigner["ranges"]
        found["sigma"] = assigner["sigma"]

    if box["kind"] == "Deltas":
        found["bbox_coder"] = dict(
            type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=box["stds"]
        )
    if box["kind"] == "Distances":
        found["norm_on_bbox"] = box["unit"] == "strides"
    if box["kind"] == "LogDistances":
        found["base_edge_list"] = [box["base"] * stride for stride in strides]
    if box["kind"] == "GeneralDistribution":
        found["reg_max"] = box["n"]
        found["loss_dfl"] = dict(type="DistributionFocalLoss", loss_weight=detector["dfl_weight"])

    if classification["kind"] == "QualityFocal":
        found["loss_cls"] = dict(
            type="QualityFocalLoss", use_sigmoid=True, beta=classification["beta"], loss_weight=1.0
        )
    if classification["kind"] == "Focal":
        found["loss_cls"] = dict(
            type="FocalLoss",
            use_sigmoid=True,
            alpha=classification["alpha"],
            gamma=classification["gamma"],
            loss_weight=1.0,
        )
    weight = detector["box_weight"]
    if box_loss["kind"] == "Overlap":
        kind = {"giou": "GIoU", "iou": "IoU", "diou": "DIoU", "ciou": "CIoU"}[box_loss["loss"]]
        found["loss_bbox"] = dict(type=f"{kind}Loss", loss_weight=weight)
    elif classification["kind"] != "SoftmaxMining":  # SSDHead has it in train_cfg
        beta = box_loss["beta"]
        kind = dict(type="SmoothL1Loss", beta=beta) if beta else dict(type="L1Loss")
        found["loss_bbox"] = dict(**kind, loss_weight=weight)
    return found
