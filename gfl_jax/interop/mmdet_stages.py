"""Runs mmdetection on a job of `crosscheck`: a program of its own, for an environment without jax.

`python mmdet_stages.py JOB.npz OUT.npz`; exits with status 3 where mmdetection is not installed.
The job holds `images` (uint8 RGB, padded), `sizes`, `boxes.I`, `labels.I`, the state dict under
`param.NAME` and `config`, JSON of the sizes. Writes the stages by the names of `stages.py`.
"""

import json
import sys

import numpy as np

MISSING = 3


def model_config(config):
    """The detector in mmdetection's words."""
    bottleneck = config["depth"] >= 50
    channels = [config["width"] * 2**i * (4 if bottleneck else 1) for i in range(4)]
    settings = dict(
        train_cfg=dict(
            assigner=dict(type="ATSSAssigner", topk=config["topk"]),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=dict(
            nms_pre=config["nms_pre"],
            min_bbox_size=0,
            score_thr=config["score_threshold"],
            nms=dict(type="nms", iou_threshold=config["nms_iou"]),
            max_per_img=config["max_per_image"],
        ),
    )
    return dict(
        type="GFL",
        data_preprocessor=dict(
            type="DetDataPreprocessor",
            mean=config["mean"],
            std=config["std"],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=dict(
            type="ResNet",
            depth=config["depth"],
            base_channels=config["width"],
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            frozen_stages=1,
            norm_cfg=dict(type="BN", requires_grad=True),
            norm_eval=True,
            style="pytorch",
        ),
        neck=dict(
            type="FPN",
            in_channels=channels,
            out_channels=config["fpn_width"],
            start_level=1,
            add_extra_convs="on_output",
            num_outs=5,
        ),
        bbox_head=dict(
            type="GFLHead",
            num_classes=config["num_classes"],
            in_channels=config["fpn_width"],
            stacked_convs=config["stacked_convs"],
            feat_channels=config["head_width"],
            anchor_generator=dict(
                type="AnchorGenerator",
                ratios=[1.0],
                octave_base_scale=config["anchor_scale"],
                scales_per_octave=1,
                strides=config["strides"],
                center_offset=config["center_offset"],
            ),
            loss_cls=dict(
                type="QualityFocalLoss", use_sigmoid=True, beta=config["beta"], loss_weight=1.0
            ),
            loss_dfl=dict(type="DistributionFocalLoss", loss_weight=config["dfl_weight"]),
            reg_max=config["n"],
            loss_bbox=dict(type="GIoULoss", loss_weight=config["box_weight"]),
        ),
        **settings,
    )


def main(job_file, out_file):
    """Job in, stages out."""
    try:
        import torch
        from mmdet.registry import MODELS
        from mmdet.structures import DetDataSample
        from mmdet.utils import register_all_modules
        from mmengine.config import ConfigDict
        from mmengine.structures import InstanceData
    except ImportError as error:
        print(f"mmdetection is not installed: {error}")
        sys.exit(MISSING)
    register_all_modules()
    job = np.load(job_file)
    config = json.loads(str(job["config"]))
    if config["delta"] != 1:
        sys.exit("mmdetection knows no other bin width than 1")
    model = MODELS.build(ConfigDict(model_config(config))).eval()
    prefix = "param."
    state = {
        key[len(prefix) :]: torch.from_numpy(job[key])
        for key in job.files
        if key.startswith(prefix)
    }
    report = model.load_state_dict(state, strict=False)
    if report.missing_keys or report.unexpected_keys:
        sys.exit(f"missing {report.missing_keys}, unexpected {report.unexpected_keys}")

    samples, pixels = [], []
    for i, (height, width) in enumerate(job["sizes"].tolist()):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0)
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(job[f"boxes.{i}"]),
            labels=torch.from_numpy(job[f"labels.{i}"]).long(),
        )
        samples.append(sample)
        image = job["images"][i, :height, :width, ::-1]
        pixels.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))

    out = {}
    with torch.no_grad():
        data = model.data_preprocessor(dict(inputs=pixels, data_samples=samples), training=True)
        x, samples = data["inputs"], data["data_samples"]
        out["input"] = x
        backbone = model.backbone(x)
        pyramid = model.neck(backbone)
        cls, box = model.bbox_head(pyramid)
        losses = model.bbox_head.loss_by_feat(
            cls, box, [s.gt_instances for s in samples], [s.metainfo for s in samples]
        )
        found = model.bbox_head.predict_by_feat(
            cls, box, batch_img_metas=[s.metainfo for s in samples], rescale=False
        )
    out |= {f"backbone.{i}": feature for i, feature in enumerate(backbone)}
    for name, maps in (("feature", pyramid), ("head.cls", cls), ("head.box", box)):
        out |= {f"{name}.P{level}": x for level, x in enumerate(maps, 3)}
    out |= {f"loss.{name}": sum(parts) for name, parts in losses.items()}
    for i, detections in enumerate(found):
        out[f"det.boxes.{i}"] = detections.bboxes
        out[f"det.scores.{i}"] = detections.scores
        out[f"det.labels.{i}"] = detections.labels
    np.savez(out_file, **{name: np.asarray(value) for name, value in out.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
