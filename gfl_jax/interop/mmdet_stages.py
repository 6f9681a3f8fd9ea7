"""Runs mmdetection on a job of `crosscheck`: a script for an environment without jax.

`python mmdet_stages.py JOB.npz OUT.npz`; exits with status 3 if mmdetection is not installed and 4
if it has no such detector. The job holds `images` (uint8 RGB, padded), `sizes`, `boxes.I`,
`labels.I`, the state dict as `param.NAME` and `config`: JSON of the experiment and `num_classes`.
Writes the stages under the names in `stages.py`.
"""

import json
import sys

import numpy as np

MISSING, REFUSED = 3, 4


def main(job_file, out_file):
    """Job in, stages out."""
    from mmdet_config import model_config  # beside this file, which runs as a script

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
    try:
        config = model_config(json.loads(str(job["config"])))
    except ValueError as error:
        print(error)
        sys.exit(REFUSED)
    model = MODELS.build(ConfigDict(config)).eval()
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
    head = model.bbox_head
    if config["bbox_head"]["type"] == "SSDHead":
        head.loss_cls = None  # version 3.3 reads it for predictions and never sets it
    with torch.no_grad():
        data = model.data_preprocessor(dict(inputs=pixels, data_samples=samples), training=True)
        x, samples = data["inputs"], data["data_samples"]
        objects, metas = [s.gt_instances for s in samples], [s.metainfo for s in samples]
        out["input"] = x
        backbone = model.backbone(x)
        pyramid = model.neck(backbone)
        # FCOSHead's distances are in other units in training.
        outputs = head.train()(pyramid)
        losses = head.loss_by_feat(*outputs, objects, metas)
        found = head.eval().predict_by_feat(*head(pyramid), batch_img_metas=metas, rescale=False)
    out |= {f"backbone.{i}": feature for i, feature in enumerate(backbone)}
    letter, first = ("P", 3) if len(backbone) == 4 else ("S", 0)
    branches = ("head.cls", "head.box", "head.quality")[: len(outputs)]
    for name, maps in (("feature", pyramid), *zip(branches, outputs, strict=True)):
        out |= {f"{name}.{letter}{level}": x for level, x in enumerate(maps, first)}
    for name, loss in losses.items():
        out[f"loss.{name}"] = (loss if torch.is_tensor(loss) else sum(loss)).sum()
    for i, detections in enumerate(found):
        out[f"det.boxes.{i}"] = detections.bboxes
        out[f"det.scores.{i}"] = detections.scores
        out[f"det.labels.{i}"] = detections.labels
    np.savez(out_file, **{name: np.asarray(value) for name, value in out.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
