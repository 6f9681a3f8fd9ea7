"""Schedule and optimiser against section 12 of the reference, and what a step may change."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl_jax import systems
from gfl_jax.config import Train
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import AXIS, REPLICATED, SHARDED, Pmap
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.training.step import init_state, learning_rate, make_train_step, sgd

# ---------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.01 * 0.001),
        (1, 0.01 * (0.001 + 0.999 / 499)),
        (250, 0.01 * (0.001 + 0.999 * 250 / 499)),
        (498, 0.01 * (0.001 + 0.999 * 498 / 499)),
        (499, 0.01),
        (799, 0.01),
        (800, 0.001),  # the first step of the ninth epoch
        (1099, 0.001),
        (1100, 0.0001),
        (10**6, 0.0001),
    ],
)
def test_learning_rate_of_the_reference_schedule(step, expected):
    schedule = learning_rate(Train(), steps_per_epoch=100)
    # Near 0 the rise is rounded to a float32 of its top.
    assert float(schedule(step)) == pytest.approx(expected, rel=2e-6, abs=2e-9)


@pytest.mark.parametrize("batch_size", [2, 16, 128])
def test_learning_rate_scales_with_the_batch(batch_size):
    schedule = learning_rate(Train(batch_size=batch_size), steps_per_epoch=100)
    for step in (0, 600, 900):
        reference = float(learning_rate(Train(), 100)(step))
        assert float(schedule(step)) == pytest.approx(reference * batch_size / 16, rel=1e-6)


def test_without_warm_up_the_first_step_has_the_full_rate():
    schedule = learning_rate(Train(warmup_steps=0, lr=0.5), steps_per_epoch=3)
    assert [float(schedule(step)) for step in (0, 1, 23)] == pytest.approx([0.5] * 3)
    assert float(schedule(24)) == pytest.approx(0.05)


@settings(max_examples=40)
@given(
    step=st.integers(0, 5000),
    warmup=st.integers(2, 2000),
    per_epoch=st.integers(1, 300),
    factor=st.floats(0.0, 1.0),
    milestones=st.lists(st.integers(1, 20), max_size=3, unique=True),
)
def test_learning_rate_is_warm_up_times_drops(step, warmup, per_epoch, factor, milestones):
    train = Train(lr=0.02, warmup_steps=warmup, warmup_factor=factor, milestones=tuple(milestones))
    rise = min(factor + (1 - factor) * step / (warmup - 1), 1.0)
    drops = sum(step >= milestone * per_epoch for milestone in milestones)
    rate = learning_rate(train, per_epoch)(jnp.int32(step))
    assert float(rate) == pytest.approx(0.02 * rise * 0.1**drops, rel=2e-5, abs=5e-9)


@pytest.mark.parametrize("factor", [1 / 3, 0.0, 1.0])
@pytest.mark.parametrize("warmup", [500, 2, 1, 0])
def test_constant_warm_up_rises_at_once(factor, warmup):
    train = Train(warmup="constant", warmup_steps=warmup, warmup_factor=factor, batch_size=8)
    schedule = learning_rate(train, steps_per_epoch=100)
    # As where it is linear, its last step has the whole rate, unless it is the first one too.
    first = [step for step in (0, 1, 250, 498) if step < max(warmup - 1, warmup > 0)]
    assert [float(schedule(step)) for step in first] == pytest.approx([0.005 * factor] * len(first))
    whole = [step for step in (0, 1, 250, 498, 499, 500, 799) if step not in first]
    assert [float(schedule(step)) for step in whole] == pytest.approx([0.005] * len(whole))
    assert [float(schedule(step)) for step in (800, 1100)] == pytest.approx([0.0005, 0.00005])


# ---------------------------------------------------------------------------- SGD

RATES = [0.3, 0.3, 0.1, 0.01, 0.2]


def optimised(train, params, gradients):
    """The parameters after each step of `sgd` with the rates of RATES."""
    optimizer = sgd(train, lambda step: jnp.array(RATES)[step])
    state, trace = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trace.append({name: np.asarray(value) for name, value in params.items()})
    return trace


def arrays(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "kernel": (scale * rng.normal(size=(3, 2))).astype(np.float32),
        "bias": (scale * rng.normal(size=4)).astype(np.float32),
    }


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_sgd_is_torch_s_formula(clip):
    train = Train(momentum=0.9, weight_decay=0.1, clip_norm=clip)
    params = arrays(0)
    # Norms on both sides of the limit.
    gradients = [arrays(1 + i, scale=[0.1, 3.0, 1.0, 0.2, 10.0][i]) for i in range(5)]
    trace = optimised(train, params, gradients)
    norms = [np.sqrt(sum((g**2).sum() for g in gradient.values())) for gradient in gradients]
    assert min(norms) < 1.5 < max(norms)
    value = {name: p.astype(np.float64) for name, p in params.items()}
    velocity = {name: np.zeros_like(p) for name, p in value.items()}
    for i, gradient in enumerate(gradients):
        factor = min(1.0, clip / norms[i]) if clip else 1.0
        for name, g in gradient.items():
            velocity[name] = 0.9 * velocity[name] + g * factor + 0.1 * value[name]
            value[name] = value[name] - RATES[i] * velocity[name]
            np.testing.assert_allclose(trace[i][name], value[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_sgd_is_torch_s(clip):
    torch = pytest.importorskip("torch")
    train = Train(momentum=0.9, weight_decay=0.1, clip_norm=clip)
    gradients = [arrays(1 + i, scale=[0.1, 3.0, 1.0, 0.2, 10.0][i]) for i in range(5)]
    trace = optimised(train, arrays(0), gradients)
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in arrays(0).items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=1.0, momentum=0.9, weight_decay=0.1)
    for i, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = RATES[i]
        for name, p in theirs.items():
            p.grad = torch.tensor(gradient[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        optimizer.step()
        for name, p in theirs.items():
            np.testing.assert_allclose(trace[i][name], p.detach().numpy(), rtol=1e-5, atol=2e-6)


def modules(seed, scale=1.0):
    """Two convolutions, one without a bias, a norm and a factor."""
    rng = np.random.default_rng(seed)
    names = (
        "a.conv.kernel",
        "a.conv.bias",
        "b.kernel",
        "a.gn.scale",
        "a.gn.bias",
        "scales.0.scale",
    )
    return {name: (scale * rng.normal(size=(2, 3))).astype(np.float32) for name in names}


@pytest.mark.parametrize("clip", [0.0, 1.5])
@pytest.mark.parametrize(("bias_lr", "bias_decay"), [(2.0, 0.0), (0.5, 1.0), (1.0, 3.0)])
def test_biases_have_a_rate_and_a_decay_of_their_own(clip, bias_lr, bias_decay):
    """The decay is of all biases, the rate of convolutions' alone."""
    train = Train(weight_decay=0.1, bias_lr=bias_lr, bias_decay=bias_decay, clip_norm=clip)
    gradients = [modules(1 + i, scale=[0.1, 3.0, 1.0, 0.2, 10.0][i]) for i in range(5)]
    trace = optimised(train, modules(0), gradients)
    for name, value in modules(0).items():
        rate = bias_lr if name == "a.conv.bias" else 1.0
        decay = 0.1 * (bias_decay if name in ("a.conv.bias", "a.gn.bias") else 1.0)
        value, velocity = value.astype(np.float64), 0.0
        for i, gradient in enumerate(gradients):
            norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
            factor = min(1.0, clip / norm) if clip else 1.0
            velocity = 0.9 * velocity + factor * gradient[name] + decay * value
            value = value - RATES[i] * rate * velocity
            np.testing.assert_allclose(trace[i][name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def test_biases_with_a_rate_and_a_decay_are_torch_s_parameter_groups():
    torch = pytest.importorskip("torch")
    train = Train(weight_decay=0.1, bias_lr=2.0, bias_decay=0.0)
    gradients = [modules(1 + i) for i in range(5)]
    trace = optimised(train, modules(0), gradients)
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in modules(0).items()}
    groups = [
        {
            "params": [p],
            "factor": 2.0 if name == "a.conv.bias" else 1.0,
            "weight_decay": 0.0 if name.endswith("bias") else 0.1,
        }
        for name, p in theirs.items()
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    for i, gradient in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = RATES[i] * group["factor"]
        for name, p in theirs.items():
            p.grad = torch.tensor(gradient[name])
        optimizer.step()
        for name, p in theirs.items():
            np.testing.assert_allclose(trace[i][name], p.detach().numpy(), rtol=1e-5, atol=2e-6)


def test_only_biases_of_convolutions_are_faster_in_fcos():
    """A step from the same gradient everywhere, without decay and momentum."""
    train = dataclasses.replace(systems.fcos_improved.train, weight_decay=0.0)
    assert (train.bias_lr, train.bias_decay) == (2.0, 0.0)
    detector, model = systems.fcos_improved.detector, systems.fcos_improved.model
    small = dataclasses.replace(
        model,
        backbone=dataclasses.replace(model.backbone, depth=18, width=8, train_norm=True),
        neck=Neck(32),
        head=dataclasses.replace(model.head, width=32),
    )
    network = Network(small, detector.predicts(3))
    params = jax.eval_shape(lambda: network.init(0)).params
    optimizer = sgd(train, optax.constant_schedule(0.25))
    ones = {name: jnp.ones(array.shape) for name, array in params.items()}
    updates, _ = optimizer.update(ones, optimizer.init(ones), ones)
    norms = re.compile(r"(\.gn|\.bn\d|downsample\.1)\.bias$")
    faster = {name for name in params if name.endswith(".bias") and not norms.search(name)}
    assert len(faster) == 3 + 5 + 8 + 3  # laterals, pyramid, towers, outputs
    for name, update in updates.items():
        np.testing.assert_array_equal(update, -0.5 if name in faster else -0.25, err_msg=name)


# ---------------------------------------------------------------------------- the step

TRAIN = Train(
    batch_size=4, lr=0.4, warmup_steps=0, milestones=(1,), weight_decay=0.05, clip_norm=0.1
)


@functools.cache
def compiled(linear_network, ema_decay):
    """The step on one device, a state to start from (host arrays), and the mapping."""
    network = linear_network(None, Detector().predicts(3))
    train = Train(**{**TRAIN.__dict__, "ema_decay": ema_decay})
    schedule = learning_rate(train, steps_per_epoch=2)
    optimizer = sgd(train, schedule)
    devices = Pmap(jax.local_devices()[:1])
    step = make_train_step(network, Detector(), optimizer, schedule, train)
    mapped = devices.map(step, outputs=(REPLICATED, REPLICATED, SHARDED))
    return mapped, jax.device_get(init_state(network.init(0), optimizer, train)), devices


def run(linear_network, batches, ema_decay=0.0):
    """The state before and after each step, and what each step reported."""
    step, first, devices = compiled(linear_network, ema_decay)
    state, states, reports = devices.replicate(first), [first], []
    for batch in batches:
        state, scalars, per_image = step(state, devices.shard(batch))
        states.append(devices.fetch_replicated(state))
        reports.append((devices.fetch_replicated(scalars), devices.fetch_sharded(per_image)))
    return states, reports


def test_a_step_counts_itself_and_reports_its_own_numbers(linear_network, make_batch):
    batches = [make_batch([3, 0, 1, 2], seed=i) for i in range(3)]
    states, reports = run(linear_network, batches)
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    # 4 images: a quarter of the rate for 16; the milestone lies after two steps.
    assert [float(scalars["lr"]) for scalars, _ in reports] == pytest.approx([0.1, 0.1, 0.01])
    for scalars, per_image in reports:
        assert set(scalars) == {"loss_cls", "loss_bbox", "loss_dfl", "loss", "grad_norm", "lr"}
        terms = {name: scalars[name] for name in per_image}
        assert set(terms) == {"loss_cls", "loss_bbox", "loss_dfl"}
        assert sum(terms.values()) == pytest.approx(scalars["loss"], rel=1e-6)
        for name, shares in per_image.items():
            assert shares.shape == (4,)
            assert shares.sum() == pytest.approx(terms[name], rel=1e-5)
        assert per_image["loss_bbox"][1] == per_image["loss_dfl"][1] == 0  # no objects
        assert per_image["loss_cls"][1] > 0


def test_grad_norm_is_that_before_clipping(linear_network, make_batch):
    batch = make_batch([3, 2, 4, 5])
    states, reports = run(linear_network, [batch])
    norm = reports[0][0]["grad_norm"]
    assert norm > TRAIN.clip_norm
    # The first update is -lr (clipped gradient + decay p).
    before, after = (state.variables.params for state in states)
    clipped = [(before[k] - after[k]) / 0.1 - TRAIN.weight_decay * before[k] for k in before]
    assert np.sqrt(sum((g**2).sum() for g in clipped)) == pytest.approx(0.1, rel=1e-3)


def test_slots_that_only_fill_the_batch_train_nothing_but_weight_decay(linear_network, make_batch):
    batch = make_batch([0, 0, 0, 0])._replace(image_mask=np.zeros(4, bool))
    states, [(scalars, per_image)] = run(linear_network, [batch])
    assert scalars["loss"] == scalars["grad_norm"] == 0
    assert all((shares == 0).all() for shares in per_image.values())
    before, after = (state.variables for state in states)
    for name, p in before.params.items():  # biases, too
        np.testing.assert_allclose(after.params[name], p * (1 - 0.1 * 0.05), rtol=1e-6)


def test_filling_slots_do_not_change_the_step(linear_network, make_batch):
    """Three images and a filler: the same as if the filler held anything else."""
    batch = make_batch([3, 1, 2, 0])
    mask = np.array([True, True, True, False])
    other = batch.images.copy()
    other[3] = 255 - other[3]
    outcomes = [
        run(linear_network, [batch._replace(image_mask=mask, images=images)])
        for images in (batch.images, other)
    ]
    (first, [(scalars, per_image)]), (second, _) = outcomes
    assert all(shares[3] == 0 for shares in per_image.values())
    assert scalars["loss"] > 0
    for name, value in first[1].variables.params.items():
        np.testing.assert_array_equal(value, second[1].variables.params[name])


def test_frozen_parameters_keep_every_bit(linear_network, make_batch):
    states, _ = run(linear_network, [make_batch([3, 0, 1, 2], seed=i) for i in range(3)])
    first, last = states[0].variables, states[-1].variables
    np.testing.assert_array_equal(first.frozen["gain"], last.frozen["gain"])
    for name, value in first.params.items():
        assert not np.array_equal(value, last.params[name])
    # They have no momentum either.
    momenta = jax.tree.leaves(states[0].optimizer)
    assert sum(m.size for m in momenta if m.ndim) == sum(p.size for p in first.params.values())


def test_statistics_are_taken_over(linear_network, make_batch):
    batch = make_batch([1, 1, 1, 1])
    states, _ = run(linear_network, [batch])
    mean = 0.1 * 1.5 * (batch.images.mean((0, 1, 2)) / 255 - 0.5)
    np.testing.assert_allclose(states[1].variables.stats["mean"], mean, rtol=1e-3)


def test_ema_averages_the_parameters_and_is_what_is_evaluated(linear_network, make_batch):
    batches = [make_batch([3, 0, 1, 2], seed=i) for i in range(3)]
    states, _ = run(linear_network, batches, ema_decay=0.8)
    average = states[0].variables.params
    for state in states[1:]:
        average = {k: 0.8 * average[k] + 0.2 * p for k, p in state.variables.params.items()}
        for name, value in average.items():
            np.testing.assert_allclose(state.ema[name], value, rtol=1e-5, atol=1e-7)
            assert state.evaluated().params[name] is state.ema[name]
        assert state.evaluated().frozen is state.variables.frozen


def test_without_ema_the_parameters_themselves_are_evaluated(linear_network):
    _, state, _ = compiled(linear_network, 0.0)
    assert state.ema == {}
    assert state.evaluated().params is state.variables.params


def test_constants_go_through_a_step_untouched_and_are_not_averaged(make_batch):
    """Of a frozen BatchNorm nothing is computed or sent; the statistics of 'bn' are."""
    summed = {}
    for norm in ("frozen_bn", "bn"):
        backbone = Backbone(depth=18, width=8, norm=norm, frozen_stages=-1)
        model = Model(backbone, Neck(32), Head(width=32, stacked_convs=1))
        network, optimizer = Network(model, Detector().predicts(3)), optax.sgd(0.1)
        step = make_train_step(network, Detector(), optimizer, lambda step: 0.1, TRAIN)
        state = jax.eval_shape(lambda n=network, o=optimizer: init_state(n.init(0), o, TRAIN))
        trace = jax.make_jaxpr(step, axis_env=[(AXIS, 1)], return_shape=True)
        jaxpr, outputs = trace(state, make_batch([1, 2]))
        inputs = dict(zip(paths(state), jaxpr.jaxpr.invars, strict=False))
        returned = zip(paths(outputs[0]), jaxpr.jaxpr.outvars, strict=False)
        untouched = {path for path, variable in returned if variable is inputs[path]}
        assert untouched == {f".variables.frozen[{name!r}]" for name in state.variables.frozen}
        assert len(state.variables.frozen) == (2 * 20 if norm == "frozen_bn" else 0)
        sums = [e for e in jaxpr.jaxpr.eqns if e.primitive.name.startswith("psum")]
        summed[norm] = sum(len(equation.invars) for equation in sums)
    assert summed["bn"] == summed["frozen_bn"] + 2 * 20


def paths(tree):
    """The paths of its arrays."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]


@pytest.mark.parametrize(
    ("stages", "prefixes"),
    [
        (-1, ()),
        (0, ("backbone.conv1.", "backbone.bn1.")),
        (1, ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")),
        (2, ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.", "backbone.layer2.")),
    ],
)
def test_frozen_stages_hold_exactly_the_named_stages(stages, prefixes):
    backbone = Backbone(depth=18, width=8, norm="frozen_bn", frozen_stages=stages)
    model = Model(backbone, Neck(32), Head(width=32, stacked_convs=1))
    network = Network(model, Detector().predicts(3))
    params, frozen, _ = jax.eval_shape(lambda: network.init(0))
    frozen = [name for name in frozen if not name.endswith((".mean", ".var"))]  # of every stage
    assert all(name.startswith(prefixes) for name in frozen)
    assert not any(prefixes and name.startswith(prefixes) for name in params)
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in frozen)
