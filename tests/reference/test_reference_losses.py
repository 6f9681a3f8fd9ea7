"""Each loss of the reference: its elements, its weighted and averaged forms, their gradients."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gfl_jax import losses
from gfl_jax.boxes import aligned_iou

EPS = np.finfo(np.float32).eps
"""Added by the reference to what it divides by."""


def make_loss(case, name, config, num_classes):
    """The elements of a loss as a function of the prediction alone."""

    def one_hot(values):  # the value at the label of each row; the last label is the background
        return (case[f"{name}.labels"][:, None] == np.arange(num_classes)) * values

    kind = config["type"]
    if kind == "QualityFocalLoss":
        targets = one_hot(case[f"{name}.quality"][:, None])
        return lambda pred: losses.quality_focal_loss(pred, targets, config["beta"]).sum(-1)
    if kind == "FocalLoss":
        options = {"alpha": config["alpha"], "gamma": config["gamma"]}
        return lambda pred: losses.sigmoid_focal_loss(pred, one_hot(1), **options)
    target = case[f"{name}.target"]
    if kind == "VarifocalLoss":
        options = {"alpha": config["alpha"], "gamma": config["gamma"]}
        # Not weighted by the IoU, a positive counts as much as any other.
        weight = np.where(target > 0, target, 1) if not config["iou_weighted"] else 1
        return lambda pred: losses.varifocal_loss(pred, target, **options) / weight
    if kind == "IoULoss" and config["mode"] == "linear":
        return lambda pred: 1 - aligned_iou(pred, target)
    loss = {
        "DistributionFocalLoss": losses.distribution_focal_loss,
        "IoULoss": losses.iou_loss,
        "GIoULoss": losses.giou_loss,
        "DIoULoss": losses.diou_loss,
        "CIoULoss": losses.ciou_loss,
        "L1Loss": losses.l1_loss,
        "SmoothL1Loss": partial(losses.smooth_l1_loss, beta=config.get("beta")),
    }[kind]
    return lambda pred: loss(pred, target)


def test_losses(loss_case, compare):
    meta = json.loads(str(loss_case["meta"]))
    for entry in meta["cases"]:
        name, averaged = entry["name"], entry["avg_factor"] + EPS
        loss = make_loss(loss_case, name, entry["config"], meta["num_classes"])
        pred, weight = jnp.asarray(loss_case[f"{name}.pred"]), loss_case[f"{name}.weight"]

        def weighted(pred, loss=loss, weight=weight):
            elements = loss(pred)
            return elements * weight.reshape(*weight.shape, *[1] * (elements.ndim - weight.ndim))

        for form, function, reduce in (
            ("", loss, jnp.mean),
            (".weighted", weighted, lambda x, averaged=averaged: x.sum() / averaged),
        ):
            total = jax.jit(jax.value_and_grad(lambda p, f=function, r=reduce: r(f(p))))
            value, gradient = total(pred)
            key, kind = name + form, name.split(".")[0]
            compare(kind, function(pred), loss_case[f"{key}.none"], 1e-5)
            compare(f"{kind}.reduced", value, loss_case[f"{key}.reduced"], 1e-5)
            compare(f"{kind}.grad", gradient, loss_case[f"{key}.grad"], 1e-5)
