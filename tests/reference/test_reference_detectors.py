"""Every quantity of every stored detector, from its parameters to ten optimiser steps."""

import jax
import numpy as np
import pytest

from gfl_jax.config import Train
from gfl_jax.distributed import REPLICATED, SHARDED, Pmap
from gfl_jax.interop.crosscheck import MARGIN, PIXELS, SCORES, detections_of, match
from gfl_jax.interop.stages import torch_arrays
from gfl_jax.training.step import init_state, learning_rate, make_train_step, sgd


def statistics(x):
    """Mean, standard deviation and largest absolute value of each image."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    return np.stack([x.mean(1), x.std(1), np.abs(x).max(1)], 1)


def compare_statistics(compare, case, name):
    theirs = case[f"{name}.stats"]
    ours = statistics(case.stages[name])
    # A mean of values of both signs is judged by the size of the values.
    compare(name.split(".")[0] + ".stats", ours, theirs, 1e-4, scale=theirs.max(1, keepdims=True))


def test_parameters(detector_case, compare):
    arrays = [
        detector_case.state_dict[str(n)].astype(np.float64) for n in detector_case["param.names"]
    ]
    norms = np.array([np.linalg.norm(a.ravel()) for a in arrays])
    compare("param.norm", norms, detector_case["param.norm"], 1e-6)
    sums, size = np.array([a.sum() for a in arrays]), np.array([np.abs(a).sum() for a in arrays])
    compare("param.sum", sums, detector_case["param.sum"], 1e-6, scale=size)


def test_input(detector_case, compare):
    compare_statistics(compare, detector_case, "input")
    assert detector_case.stages["input"].shape == tuple(detector_case["input.batch_shape"])
    padded = -(-np.asarray(detector_case.batch.sizes) // 32) * 32
    np.testing.assert_array_equal(padded, detector_case["input.pad_shape"])


def test_features(detector_case, compare):
    for i in range(len(detector_case.keys("backbone."))):
        compare_statistics(compare, detector_case, f"backbone.{i}")
    for level in detector_case.meta["levels"]:
        name = f"feature.{level}"
        compare_statistics(compare, detector_case, name)
        if name in detector_case.stored:
            compare("feature", detector_case.stages[name][0], detector_case[name], 1e-4)


@pytest.mark.parametrize("branch", ["cls", "box", "quality"])
def test_head(detector_case, compare, branch):
    assert ("head.quality.P3" in detector_case.stages) == bool(detector_case.keys("head.quality."))
    for level in detector_case.meta["levels"]:
        name = f"head.{branch}.{level}"
        if branch == "quality" and name not in detector_case.stored:
            continue
        compare_statistics(compare, detector_case, name)
        images = detector_case.meta["head_images"]
        step = detector_case.meta["head_stride"].get(f"{branch}.{level}", 1)
        ours = detector_case.stages[name][:images, :, ::step, ::step]
        compare(f"head.{branch}", ours, detector_case[name], 1e-4)


def test_assignment(detector_case, compare):
    for key in ("gt", "labels", "weight", "num_pos"):
        name = f"assign.{key}"
        if name in detector_case.stored:
            wrong = np.count_nonzero(detector_case.stages[name] != detector_case[name])
            compare.record(name, wrong, 0)
    # GFL and ATSS regress boxes as such, the others what their representation makes of them.
    boxes = detector_case.meta["model"]["type"] in ("GFL", "ATSS")
    ours = detector_case.stages["assign.box_targets" if boxes else "assign.parameters"]
    compare("assign.box_targets", ours, detector_case["assign.box_targets"], 1e-6)
    if "assign.centerness" in detector_case.stored:
        ours = detector_case.stages["assign.centerness"]
        compare("assign.centerness", ours, detector_case["assign.centerness"], 1e-6)
    assert detector_case["assign.num_pos"].sum() > 0 or not np.any(detector_case.batch.box_mask)


def test_losses(detector_case, compare):
    names = [key for key in detector_case.keys("loss.") if not key.startswith("loss.total")]
    terms = {name for name in detector_case.stages if name.count(".") == 1 and "loss." in name}
    assert {name for name in names if name.count(".") == 1} == terms - {"loss.total"}
    for name in [*names, "loss.total"]:
        # SSD's parts are images, those of the others levels.
        images = name.endswith(".parts") and "S0" in detector_case.meta["levels"]
        ours = detector_case.stages[name.replace(".parts", ".images") if images else name]
        compare(name, ours, detector_case[name], 1e-4)


def test_gradients(detector_case, compare):
    gradients = torch_arrays(detector_case.network, detector_case.gradients)
    names = [str(name) for name in detector_case["gradnorm.names"]]
    assert set(names) == set(gradients)
    norms = np.array([np.linalg.norm(gradients[n].astype(np.float64).ravel()) for n in names])
    theirs, total = detector_case["gradnorm.norm"], detector_case["gradnorm.total"]
    # Gradients that cancel nearly to nothing are judged by the whole.
    compare("gradnorm", norms, theirs, 5e-3, scale=np.maximum(theirs, 1e-4 * total))
    compare("gradnorm.total", np.linalg.norm(norms), total, 5e-3)
    for key in detector_case.keys("grad."):
        compare(key, gradients[key.removeprefix("grad.")], detector_case[key], 3e-2)


@pytest.mark.parametrize("kind", ["raw", "det"])
def test_detections(detector_case, compare, kind):
    inference = detector_case.detector.inference
    threshold, most = inference.score_threshold, inference.max_per_image
    for i in range(len(detector_case.keys("images."))):
        boxes, scores, _ = ours = detections_of(detector_case.stages, kind, i)
        their_boxes, their_scores, _ = theirs = detections_of(detector_case, kind, i)
        matches = match(ours, theirs)
        extra = np.setdiff1d(np.arange(len(scores)), matches)
        marginal = [threshold]
        if kind == "det" and len(their_scores) == most:
            marginal.append(their_scores[-1])
        for score in [*their_scores[matches < 0], *scores[extra]]:
            assert min(abs(score - margin) for margin in marginal) < MARGIN, f"image {i}: {score}"
        compare.record(f"{kind}.unmatched", np.sum(matches < 0) + len(extra), np.inf)

        pairs = np.flatnonzero(matches >= 0)
        found = matches[pairs]
        if not len(pairs):
            continue
        compare.record(f"{kind}.boxes px", np.abs(boxes[found] - their_boxes[pairs]).max(), PIXELS)
        compare.record(f"{kind}.scores", np.abs(scores[found] - their_scores[pairs]).max(), SCORES)
        if kind == "det":
            first, second = np.triu_indices(len(pairs), 1)
            swapped = found[first] > found[second]
            gap = their_scores[pairs[first]] - their_scores[pairs[second]]
            assert np.all(gap[swapped] < MARGIN), f"image {i}: in another order"


def test_trajectory(detector_case, compare):
    """The stored steps, ten of most detectors, by the project's own train step, from rest."""
    plan = detector_case.meta["trajectory"]
    assert plan.get("from_rest"), "an outdated case: its first step used the gradient twice"
    warmup = plan["warmup"]
    constant = warmup["type"] == "ConstantLR"
    train = Train(
        batch_size=plan["batch"],
        lr=plan["lr"] * 16 / plan["batch"],
        momentum=plan["momentum"],
        weight_decay=plan["weight_decay"],
        bias_lr=plan["bias_lr_mult"],
        bias_decay=plan["bias_decay_mult"],
        clip_norm=plan["clip_norm"] or 0.0,
        warmup="constant" if constant else "linear",
        warmup_steps=warmup["end"] - warmup["begin"],
        warmup_factor=warmup["factor" if constant else "start_factor"],
        epochs=1,
        milestones=(),
    )
    schedule = learning_rate(train, plan["steps"])
    optimizer = sgd(train, schedule)
    function = make_train_step(
        detector_case.network, detector_case.detector, optimizer, schedule, train
    )
    one = Pmap(jax.local_devices()[:1])
    step = one.map(function, outputs=(REPLICATED, REPLICATED, SHARDED))
    state = init_state(detector_case.variables, optimizer, train)
    state = one.replicate(state)
    batch = one.shard(jax.tree.map(np.asarray, detector_case.batch))
    logged = []
    for _ in range(plan["steps"]):
        state, scalars, _ = step(state, batch)
        logged.append(one.fetch_replicated(scalars))

    def series(name):
        return np.array([scalars[name] for scalars in logged])

    compare("trajectory.lr", series("lr"), detector_case["trajectory.lr"], 1e-6)
    of_biases = series("lr") * train.bias_lr
    compare("trajectory.max_lr", of_biases, detector_case["trajectory.max_lr"], 1e-6)
    names = {"total": "loss"} | {k: k for k in logged[0] if k.startswith("loss_")}
    for theirs, ours in names.items():
        key = f"trajectory.{theirs}"
        expected, noise = detector_case[key], detector_case[f"noise.{key}"]
        difference = np.abs(series(ours) - expected) / np.maximum(1e-3 * expected, 10 * noise)
        compare.record(f"{key} / allowed", difference.max(), 1.0)

    variables = one.fetch_replicated(state).variables
    arrays = torch_arrays(detector_case.network, variables.params | variables.frozen)
    ours = np.array(
        [
            np.linalg.norm(arrays[str(n)].astype(np.float64))
            for n in detector_case["trajectory.names"]
        ]
    )
    expected = detector_case["trajectory.param_norm"]
    allowed = np.maximum(1e-3 * expected, 10 * detector_case["noise.trajectory.param_norm"])
    compare.record(
        "trajectory.param_norm / allowed", (np.abs(ours - expected) / allowed).max(), 1.0
    )
