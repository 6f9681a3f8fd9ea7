"""GFL in plain PyTorch, written from the specification: the reference if mmdet is not installed.

`python torch_gfl.py JOB.npz OUT.npz`, see gfl_jax/interop/crosscheck.py. Nothing here is shared
with the package: it loops where the package masks, and gathers where the package does not.
"""

import json
import sys

import numpy as np
import torch
import torch.nn.functional as F

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class GFL:
    """Functions of a state dict `p`."""

    def __init__(self, p, config):
        self.p, self.c = p, config

    def conv(self, name, x, stride=1):
        weight = self.p[f"{name}.weight"]
        padding = (weight.shape[2] - 1) // 2
        return F.conv2d(x, weight, self.p.get(f"{name}.bias"), stride, padding)

    def bn(self, name, x):
        p = self.p
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-5)

    def block(self, name, x, stride, bottleneck):
        last = 3 if bottleneck else 2
        strided = 2 if bottleneck else 1
        y = x
        for i in range(1, last + 1):
            y = self.conv(f"{name}.conv{i}", y, stride if i == strided else 1)
            y = self.bn(f"{name}.bn{i}", y)
            y = F.relu(y) if i < last else y
        if f"{name}.downsample.0.weight" in self.p:
            x = self.bn(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride))
        return F.relu(x + y)

    def backbone(self, x):
        x = F.relu(self.bn("backbone.bn1", self.conv("backbone.conv1", x, 2)))
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for stage, blocks in enumerate(BLOCKS[self.c["depth"]], 1):
            for i in range(blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                x = self.block(f"backbone.layer{stage}.{i}", x, stride, self.c["depth"] >= 50)
            features.append(x)
        return features

    def neck(self, features):
        x = [self.conv(f"neck.lateral_convs.{i}.conv", f) for i, f in enumerate(features[1:])]
        for i in (1, 0):
            x[i] = x[i] + F.interpolate(x[i + 1], size=x[i].shape[2:], mode="nearest")
        x = [self.conv(f"neck.fpn_convs.{i}.conv", f) for i, f in enumerate(x)]
        for i in (3, 4):
            x.append(self.conv(f"neck.fpn_convs.{i}.conv", x[-1], 2))
        return x

    def tower(self, name, x):
        for i in range(self.c["stacked_convs"]):
            x = self.conv(f"bbox_head.{name}.{i}.conv", x)
            gn = f"bbox_head.{name}.{i}.gn"
            x = F.relu(F.group_norm(x, 32, self.p[f"{gn}.weight"], self.p[f"{gn}.bias"], 1e-5))
        return x

    def head(self, pyramid):
        cls, box = [], []
        for i, x in enumerate(pyramid):
            cls.append(self.conv("bbox_head.gfl_cls", self.tower("cls_convs", x)))
            raw = self.conv("bbox_head.gfl_reg", self.tower("reg_convs", x))
            box.append(raw * self.p[f"bbox_head.scales.{i}.scale"])
        return cls, box

    def anchors(self, cls):
        """Centres, strides, cell (x, y) and level of all anchors."""
        rows = []
        for level, (x, stride) in enumerate(zip(cls, self.c["strides"], strict=True)):
            for j in range(x.shape[2]):
                for i in range(x.shape[3]):
                    offset = self.c["center_offset"]
                    rows.append(((i + offset) * stride, (j + offset) * stride, stride, i, j, level))
        return torch.tensor(rows)

    def flat(self, maps):
        return torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], 1)

    def distances(self, box):
        """Expected distances in strides, from flat box logits."""
        p = box.unflatten(-1, (4, self.c["n"] + 1)).softmax(-1)
        return p @ (torch.arange(self.c["n"] + 1.0) * self.c["delta"])

    def decode(self, anchors, distances):
        d = distances * anchors[:, 2:3]
        return torch.cat([anchors[:, :2] - d[..., :2], anchors[:, :2] + d[..., 2:]], -1)

    def losses(self, cls, box, sizes, all_boxes, all_labels):
        anchors, levels = self.anchors(cls), len(cls)
        cls, box = self.flat(cls), self.flat(box)
        qfl = giou = dfl = weights = 0.0
        n_pos = 0
        for i, size in enumerate(sizes):
            padded = [-(-int(side) // 32) * 32 for side in size]
            valid = (anchors[:, 4] < torch.ceil(padded[0] / anchors[:, 2])) & (
                anchors[:, 3] < torch.ceil(padded[1] / anchors[:, 2])
            )
            gts, labels = all_boxes[i], all_labels[i]
            matched = atss(anchors, valid, levels, gts, self.c["topk"], self.c["scale"])
            positive = torch.nonzero(matched >= 0).flatten()
            n_pos += max(len(positive), 1)
            target = torch.zeros_like(cls[i])
            if len(positive):
                strides = anchors[positive, 2:3]
                gt = gts[matched[positive]] / strides
                points = anchors[positive, :2] / strides
                d = self.distances(box[i, positive])
                pred = torch.cat([points - d[:, :2], points + d[:, 2:]], 1)
                iou, g = overlaps(pred, gt)
                target[positive, labels[matched[positive]]] = iou.detach()
                w = cls[i, positive].detach().sigmoid().max(1).values
                giou = giou + ((1 - g) * w).sum()
                y = torch.cat([points - gt[:, :2], gt[:, 2:] - points], 1) / self.c["delta"]
                y = y.clamp(0, self.c["n"] - 0.1).flatten()
                left = y.long()
                logits = box[i, positive].reshape(-1, self.c["n"] + 1)
                ce = F.cross_entropy(logits, left, reduction="none") * (left + 1 - y)
                ce = ce + F.cross_entropy(logits, left + 1, reduction="none") * (y - left)
                dfl = dfl + (ce.reshape(-1, 4).mean(1) * w).sum()
                weights = weights + w.sum()
            s = cls[i].sigmoid()
            bce = F.binary_cross_entropy_with_logits(cls[i], target, reduction="none")
            elements = bce * (target - s).abs().pow(self.c["beta"])
            qfl = qfl + elements[valid].sum()
        weights = max(float(weights), 1.0)
        return {
            "loss_cls": qfl / n_pos,
            "loss_bbox": self.c["box_weight"] * giou / weights,
            "loss_dfl": self.c["dfl_weight"] * dfl / weights,
        }

    def predict(self, cls, box, i, size):
        anchors = self.anchors(cls)
        boxes, scores, labels = [], [], []
        start = 0
        for c, b in zip(cls, box, strict=True):
            c = c[i].permute(1, 2, 0).flatten(0, 1).sigmoid()
            b = b[i].permute(1, 2, 0).flatten(0, 1)
            here = anchors[start : start + len(c)]
            start += len(c)
            pairs = torch.nonzero(c > self.c["score_threshold"])
            order = c[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
            pairs = pairs[order[: self.c["nms_pre"]]]
            decoded = self.decode(here[pairs[:, 0]], self.distances(b[pairs[:, 0]]))
            decoded[:, 0::2] = decoded[:, 0::2].clamp(0, int(size[1]))
            decoded[:, 1::2] = decoded[:, 1::2].clamp(0, int(size[0]))
            boxes.append(decoded)
            scores.append(c[pairs[:, 0], pairs[:, 1]])
            labels.append(pairs[:, 1])
        boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        real = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
        boxes, scores, labels = boxes[real], scores[real], labels[real]
        kept = []
        for k in scores.argsort(descending=True, stable=True).tolist():
            rivals = [j for j in kept if labels[j] == labels[k]]
            if len(kept) < self.c["max_per_image"] and (
                not rivals
                or overlaps(boxes[k].expand(len(rivals), 4), boxes[rivals])[0].max()
                <= self.c["nms_iou"]
            ):
                kept.append(k)
        return boxes[kept], scores[kept], labels[kept]


def overlaps(a, b):
    """IoU and GIoU of boxes, pair by pair."""
    inter = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    union = (area[0] + area[1] - inter).clamp(min=1e-6)
    hull = (torch.max(a[:, 2:], b[:, 2:]) - torch.min(a[:, :2], b[:, :2])).prod(1).clamp(min=1e-6)
    return inter / union, inter / union - (hull - union) / hull


def atss(anchors, valid, levels, gts, topk, anchor_scale):
    """The object assigned to each anchor, or -1; one object and one level at a time."""
    matched = torch.full((len(anchors),), -1)
    best = torch.full((len(anchors),), -1.0)
    half = anchors[:, 2:3] * anchor_scale / 2
    squares = torch.cat([anchors[:, :2] - half, anchors[:, :2] + half], 1)
    for g, gt in enumerate(gts):
        iou = overlaps(squares, gt.expand(len(squares), 4))[0]
        distance = (anchors[:, :2] - (gt[:2] + gt[2:]) / 2).pow(2).sum(1).sqrt()
        candidates = []
        for level in range(levels):
            here = torch.nonzero((anchors[:, 5] == level) & valid).flatten()
            order = distance[here].argsort(stable=True)
            candidates.append(here[order[:topk]])
        candidates = torch.cat(candidates)
        if len(candidates) < 2:
            continue
        threshold = iou[candidates].mean() + iou[candidates].std()
        for a in candidates.tolist():
            x, y = anchors[a, :2]
            inside = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y) > 0.01
            if iou[a] >= threshold and inside and iou[a] > best[a]:
                best[a], matched[a] = iou[a], g
    return matched


def main(job_file, out_file):
    """Runs the job in one file and writes the stages to the other."""
    job = np.load(job_file)
    experiment = json.loads(str(job["config"]))
    colours, detector = experiment["model"], experiment["detector"]
    config = {**colours["backbone"], **colours["head"], **detector}  # fields by their own names
    for choice in ("priors", "assigner", "box", "classification", "inference"):
        config |= detector[choice]
    state = {k[6:]: torch.from_numpy(job[k]) for k in job.files if k.startswith("param.")}
    model = GFL(state, config)
    images = torch.from_numpy(job["images"].astype(np.float32)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(colours[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    sizes = job["sizes"].tolist()
    x = torch.zeros_like(images)
    for i, (height, width) in enumerate(sizes):
        x[i, :, :height, :width] = ((images[i : i + 1] - mean) / std)[0, :, :height, :width]
    boxes = [torch.from_numpy(job[f"boxes.{i}"]) for i in range(len(sizes))]
    labels = [torch.from_numpy(job[f"labels.{i}"]).long() for i in range(len(sizes))]
    with torch.no_grad():
        backbone = model.backbone(x)
        pyramid = model.neck(backbone)
        cls, box = model.head(pyramid)
        out = {"input": x} | {f"backbone.{i}": f for i, f in enumerate(backbone)}
        for name, maps in (("feature", pyramid), ("head.cls", cls), ("head.box", box)):
            out |= {f"{name}.P{level}": m for level, m in enumerate(maps, 3)}
        for name, value in model.losses(cls, box, sizes, boxes, labels).items():
            out[f"loss.{name}"] = torch.as_tensor(value)
        for i, size in enumerate(sizes):
            found = model.predict(cls, box, i, size)
            names = [f"det.{part}.{i}" for part in ("boxes", "scores", "labels")]
            out |= dict(zip(names, found, strict=True))
    np.savez(out_file, **{name: np.asarray(value) for name, value in out.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
