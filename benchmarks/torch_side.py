"""GFL in PyTorch for `gpu.py`: channels_last, autocast, everything batched.

Nothing of this package is used here.

One box per anchor, ATSS, QFL, GIoU and DFL as in section 3 of the paper; dense over all anchors, so
that torch.compile sees fixed shapes.
"""

import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STRIDES, BINS, CLASSES, TOPK = (8, 16, 32, 64, 128), 17, 80, 9


class Norm(nn.BatchNorm2d):
    """BatchNorm with constant statistics and trainable scale and bias."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Block(nn.Module):
    """Basic or bottleneck residual block."""

    def __init__(self, c_in, width, c_out, stride, bottleneck):
        super().__init__()
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        channels = [c_in] + [width] * (len(sizes) - 1) + [c_out]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, s, k // 2, bias=False)
            for (a, b), (k, s) in zip(itertools.pairwise(channels), sizes, strict=True)
        )
        self.norms = nn.ModuleList(Norm(c) for c in channels[1:])
        self.project = None
        if stride != 1 or c_in != c_out:
            self.project = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), Norm(c_out))

    def forward(self, x):
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(F.relu(y) if i else y))
        return F.relu(y + (self.project(x) if self.project else x))


class Network(nn.Module):
    """ResNet with frozen stem and first stage, FPN and the head of GFL."""

    def __init__(self, depth, width=256):
        super().__init__()
        expansion = 4 if depth >= 50 else 1
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), Norm(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        stages, c_in, outs = [], 64, []
        for stage, blocks in enumerate(BLOCKS[depth]):
            c_out, layers = 64 * 2**stage * expansion, []
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                layers.append(Block(c_in, 64 * 2**stage, c_out, stride, depth >= 50))
                c_in = c_out
            stages.append(nn.Sequential(*layers))
            outs.append(c_out)
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in outs[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, 1 + (i > 2), 1) for i in range(5))

        def tower():
            layers = []
            for _ in range(4):
                layers += [
                    nn.Conv2d(width, width, 3, 1, 1, bias=False),
                    nn.GroupNorm(32, width),
                    nn.ReLU(),
                ]
            return nn.Sequential(*layers)

        self.cls_tower, self.reg_tower = tower(), tower()
        self.cls = nn.Conv2d(width, CLASSES, 3, 1, 1)
        self.reg = nn.Conv2d(width, 4 * BINS, 3, 1, 1)
        nn.init.constant_(self.cls.bias, -4.595)
        self.scales = nn.Parameter(torch.ones(5))
        for module in [self.stem, self.stages[0]]:
            module.requires_grad_(False)

    def forward(self, x):
        x, features = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        levels = [conv(f) for conv, f in zip(self.lateral, features[1:], strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[2:])
        levels = [conv(x) for conv, x in zip(self.smooth, levels, strict=False)]
        for conv in self.smooth[3:]:
            levels.append(conv(levels[-1]))
        cls = [self.cls(self.cls_tower(x)) for x in levels]
        reg = [self.reg(self.reg_tower(x)) * s for x, s in zip(levels, self.scales, strict=True)]
        return tuple(
            torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1).float()
            for maps in (cls, reg)
        )


def area(box):
    """Of boxes [..., 4]."""
    return (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)


def overlaps(a, b):
    """IoU and GIoU of boxes [..., 4], pair by pair."""
    inter = area(
        torch.cat(
            [torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1
        )
    )
    hull = area(
        torch.cat(
            [torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1
        )
    ).clamp(min=1e-6)
    union = (area(a) + area(b) - inter).clamp(min=1e-6)
    return inter / union, inter / union - (hull - union) / hull


def anchors(height, width):
    """Centres [anchors, 2] and strides of all anchors of a canvas, and their number per level."""
    centers, strides, counts = [], [], []
    for stride in STRIDES:
        h, w = -(-height // stride), -(-width // stride)
        grid = torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")
        centers.append(stride * torch.stack(grid, -1).reshape(-1, 2).float())
        strides.append(torch.full((h * w,), float(stride)))
        counts.append(h * w)
    return torch.cat(centers), torch.cat(strides), counts


def assign(centers, strides, counts, boxes, mask):
    """ATSS: index of each anchor's object [b, anchors], -1 for background."""
    distance = (centers - (boxes[:, :, None, :2] + boxes[:, :, None, 2:]) / 2).norm(dim=-1)
    index, start = [], 0
    for count in counts:
        part = distance[..., start : start + count]
        index.append(part.topk(min(TOPK, count), largest=False).indices + start)
        start += count
    index = torch.cat(index, -1)  # b gts candidates
    near = centers[index]
    half = 4 * strides[index][..., None]
    iou, _ = overlaps(torch.cat([near - half, near + half], -1), boxes[:, :, None])
    threshold = iou.mean(-1, keepdim=True) + iou.std(-1, keepdim=True)
    inside = torch.cat([near - boxes[:, :, None, :2], boxes[:, :, None, 2:] - near], -1).amin(-1)
    positive = (iou >= threshold) & (inside > 0.01) & mask[..., None]
    claim = torch.where(positive, iou, -1.0)
    dense = torch.full(distance.shape, -1.0, device=iou.device).scatter(-1, index, claim)
    best, owner = dense.max(1)
    return torch.where(best >= 0, owner, -1)


def losses(cls, reg, centers, strides, counts, boxes, labels, mask):
    """Equation 8 for a batch: QFL, GIoU and DFL."""
    matched = assign(centers, strides, counts, boxes, mask)
    positive = matched >= 0
    owner = matched.clamp(min=0)
    target = torch.gather(boxes, 1, owner[..., None].expand(-1, -1, 4)) / strides[:, None]
    points = centers / strides[:, None]
    around = torch.cat([points - 1, points + 1], -1)
    target = torch.where(positive[..., None], target, around)
    logits = reg.unflatten(-1, (4, BINS))
    sides = logits.softmax(-1) @ torch.arange(float(BINS), device=reg.device)
    boxes_now = torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)
    iou, giou = overlaps(boxes_now, target)
    score = cls.sigmoid()
    weight = score.detach().amax(-1) * positive
    label = torch.gather(labels, 1, owner)
    quality = F.one_hot(label, CLASSES) * (iou.detach() * positive)[..., None]
    qfl = F.binary_cross_entropy_with_logits(cls, quality, reduction="none")
    qfl = (qfl * (quality - score).abs().square()).sum()
    y = torch.cat([points - target[..., :2], target[..., 2:] - points], -1)
    y = y.clamp(0, BINS - 1.1)
    left = y.long()
    log = logits.log_softmax(-1)
    low = torch.gather(log, -1, left[..., None])[..., 0]
    high = torch.gather(log, -1, left[..., None] + 1)[..., 0]
    dfl = -(low * (left + 1 - y) + high * (y - left)).mean(-1)
    total = weight.sum().clamp(min=1)
    return (
        qfl / positive.sum(1).clamp(min=1).sum()
        + (2 * (1 - giou) * weight + 0.25 * dfl * weight).sum() / total
    )


def train(batch, depth, dtype, steps, compiled) -> dict:
    """Median seconds of a training step on `batch`, after warming up, and its peak memory.

    Args:
        batch: Arrays as `gfl_jax.data.batch.Batch` names them, on the host.
        depth: Of the ResNet.
        dtype: float32 or bfloat16; autocast in the latter.
        steps: Timed steps.
        compiled: Whether the step's forward pass and losses go through torch.compile.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    network = Network(depth).to(device, memory_format=torch.channels_last)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-4, 0.9, weight_decay=1e-4, fused=device == "cuda")
    images = torch.from_numpy(batch.images).to(device).permute(0, 3, 1, 2)
    centers, strides, counts = anchors(*images.shape[2:])
    centers, strides = centers.to(device), strides.to(device)
    boxes, mask = (torch.from_numpy(x).to(device) for x in (batch.boxes, batch.box_mask))
    labels = torch.from_numpy(batch.labels).long().to(device)

    def loss_of(images):
        x = ((images.float() - 118.0) / 58.0).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            cls, reg = network(x)
        return losses(cls, reg, centers, strides, counts, boxes, labels, mask)

    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images)
        loss.backward()
        optimizer.step()
        return loss

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    for _ in range(3):
        loss = step()
    wait()
    ready = time.perf_counter() - began
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(max(steps // 4, 1)):
            loss = step()
        wait()
        times.append((time.perf_counter() - start) / max(steps // 4, 1))
    numbers = {"seconds": statistics.median(times), "loss": float(loss), "ready_s": ready}
    if device == "cuda":
        numbers["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers
