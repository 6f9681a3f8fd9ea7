"""One device or eight, pmap or shard_map, one process or two: the same parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_devices import (
    CLASSES,
    DETECTOR,
    OBJECTS,
    TRAIN,
    VARIANTS,
    Trainer,
    difference,
    make_batches,
    make_network,
    parameters,
    params_of,
)
from flax import nnx

from gfl_jax.detectors.classification import Focal
from gfl_jax.detectors.dense import Detector, Losses
from gfl_jax.detectors.quality import GuidedQuality
from gfl_jax.distributed import SHARDED, Pmap, ShardMap, parallel, prefetch
from gfl_jax.models.heads import Outputs, OutputSpec
from gfl_jax.models.layers import normalization
from gfl_jax.models.network import Variables

MAPPINGS = {
    "one device": lambda: Pmap(jax.local_devices()[:1]),
    "pmap": lambda: Pmap(jax.local_devices()),
    "shard_map": lambda: ShardMap(jax.local_devices()),
    "shard_map of one": lambda: ShardMap(jax.local_devices()[:1]),
}
EIGHT = ["pmap", "shard_map"]


@pytest.fixture(scope="module")
def batches():
    return make_batches()


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.fixture(scope="module")
def trainers(network):
    return {name: Trainer(network, MAPPINGS[name]()) for name in ("one device", *EIGHT)}


@pytest.fixture(scope="module")
def outcomes(trainers, batches):
    """Final state and reports of each mapping."""
    return {name: trainer.run(batches) for name, trainer in trainers.items()}


# Float32 sums in another order: 3e-5 was measured; leaving out one box gives 0.8.
TOLERANCE = 1e-3


@pytest.mark.parametrize("mapping", EIGHT)
def test_eight_devices_reach_the_parameters_of_one(trainers, outcomes, mapping):
    first = jax.device_get(trainers["one device"].first.variables.params)
    expected = params_of(trainers["one device"], outcomes["one device"][0])
    found = params_of(trainers[mapping], outcomes[mapping][0])
    assert set(found) == set(expected) == set(first)
    # GroupNorm makes nothing of the single cells of P6 and P7: their convolutions see no gradient.
    still = {name for name, value in expected.items() if np.array_equal(value, first[name])}
    assert all(name.startswith(("neck.fpn_convs.3", "neck.fpn_convs.4")) for name in still)
    assert difference(expected, found, first) < TOLERANCE


@pytest.mark.parametrize("mapping", EIGHT)
def test_everything_else_of_the_state_agrees_too(trainers, outcomes, mapping):
    states = [
        trainers[name].devices.fetch_replicated(outcomes[name][0])
        for name in ("one device", mapping)
    ]
    first = jax.device_get(trainers["one device"].first)
    assert states[0].step == states[1].step == 3
    assert difference(states[0].ema, states[1].ema, first.ema) < TOLERANCE
    for part in ("frozen", "stats"):
        for name, value in getattr(first.variables, part).items():
            for state in states:
                np.testing.assert_array_equal(getattr(state.variables, part)[name], value)
    for ours, theirs in zip(*(jax.tree.leaves(s.optimizer) for s in states), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(ours).max())


@pytest.mark.parametrize("mapping", EIGHT)
def test_reported_losses_are_those_of_the_whole_batch(outcomes, mapping):
    for (scalars, shares), (expected, expected_shares) in zip(
        outcomes[mapping][1], outcomes["one device"][1], strict=True
    ):
        assert set(scalars) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(scalars[name], value, rtol=1e-4)
        for name, value in expected_shares.items():
            # Image by image, in the order of the batch.
            np.testing.assert_allclose(shares[name], value, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(value.sum(), expected[name], rtol=1e-5)
            assert shares[name][5] == 0  # the filler


@pytest.mark.parametrize("mapping", EIGHT)
def test_all_devices_hold_the_same_bits(outcomes, mapping):
    for leaf in jax.tree.leaves(outcomes[mapping][0]):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])


def test_the_comparison_sees_one_box_less(trainers, outcomes, batches):
    mask = batches[0].box_mask.copy()
    mask[0, 0] = False
    changed = [batches[0]._replace(box_mask=mask), *batches[1:]]
    first = jax.device_get(trainers["pmap"].first.variables.params)
    expected = params_of(trainers["one device"], outcomes["one device"][0])
    found = params_of(trainers["pmap"], trainers["pmap"].run(changed)[0])
    assert difference(expected, found, first) > 30 * TOLERANCE


@dataclasses.dataclass(frozen=True)
class LocalCounts(Detector):
    """Divides by the counts of its own device: the mistake that the global sum prevents."""

    def losses(self, outputs, batch, global_sum=None):
        return super().losses(outputs, batch)


def test_the_comparison_sees_counts_that_are_not_summed(linear_network, batches):
    network = linear_network(None, DETECTOR.predicts(CLASSES))
    one = Trainer(network, MAPPINGS["one device"]())
    wrong = Trainer(network, MAPPINGS["pmap"](), LocalCounts(**DETECTOR.__dict__))
    first = jax.device_get(one.first.variables.params)
    states = [params_of(trainer, trainer.run(batches)[0]) for trainer in (one, wrong)]
    assert difference(*states, first) > 30 * TOLERANCE


@pytest.fixture(scope="module")
def alone():
    """Parameters before and after three steps of one device in a program of its own."""
    return {
        norm: parameters(VARIANTS[name])
        for norm, name in (("frozen_bn", "1 device"), ("bn", "BatchNorm, 1 device"))
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        name
        if variant.processes > 1 and variant.norm == "frozen_bn" and variant.mapping == "pmap"
        else pytest.param(name, marks=SLOW)
        for name, variant in VARIANTS.items()
    ],
)
def test_every_way_to_compute_a_batch_gives_the_same_parameters(alone, name):
    variant = VARIANTS[name]
    first, expected = alone[variant.norm.removeprefix("sync_")]
    found_first, found = parameters(variant)
    for parameter, value in first.items():
        np.testing.assert_array_equal(found_first[parameter], value)
    assert difference(expected, found, first) < TOLERANCE


def test_predictions_do_not_depend_on_the_devices(network, make_batch):
    """Bit by bit, if each device is given as many images at once."""
    batch = make_batch(OBJECTS * 2)
    found = {}
    for name, mapping in MAPPINGS.items():
        mapped = mapping()
        trainer = Trainer(network, mapped)
        variables = mapped.replicate(trainer.first.evaluated())
        size = 2 * mapped.count
        parts = [
            jax.tree.map(lambda x, part=slice(start, start + size): x[part], batch)
            for start in range(0, len(batch.images), size)
        ]
        predicted = [
            mapped.fetch_sharded(trainer.predict(variables, mapped.shard(part))) for part in parts
        ]
        found[name] = jax.tree.map(lambda *x: np.concatenate(x), *predicted)
    expected = found["one device"]
    assert expected.mask.shape == (16, 30)
    assert expected.mask.sum() > 400
    for other in found.values():
        for ours, theirs in zip(other, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("mapping", "parts"), [("one device", 4), ("pmap", 2), ("shard_map", 2)])
def test_a_step_in_parts_is_that_of_the_whole_batch(linear_network, make_batch, mapping, parts):
    """Counts and weights that losses are divided by are of the whole, for every kind of quality."""
    batches = [make_batch(np.roll(OBJECTS * 2, i), seed=i) for i in range(2)]
    guided = dataclasses.replace(DETECTOR, quality=GuidedQuality("iou"), classification=Focal())
    for detector in (DETECTOR, guided):
        network = linear_network(None, detector.predicts(CLASSES))
        train = dataclasses.replace(TRAIN, accumulate=parts)
        whole = Trainer(network, MAPPINGS["one device"](), detector)
        split = Trainer(network, MAPPINGS[mapping](), detector, train)
        first = jax.device_get(whole.first.variables.params)
        (expected, reports), (found, others) = whole.run(batches), split.run(batches)
        assert difference(params_of(whole, expected), params_of(split, found), first) < 1e-4
        for (scalars, shares), (our_scalars, our_shares) in zip(reports, others, strict=True):
            for name, value in scalars.items():
                np.testing.assert_allclose(our_scalars[name], value, rtol=1e-4)
            for name, value in shares.items():
                np.testing.assert_allclose(our_shares[name], value, rtol=1e-3, atol=1e-6)


class Normalised:
    """A convolution and a norm: enough to tell whose statistics are used."""

    def __init__(self, norm):
        self._norm = norm

    def init(self, seed):
        rng = np.random.default_rng(seed)
        params = {
            "kernel": rng.normal(size=(3, 6)).astype(np.float32),
            "scale": rng.normal(size=6).astype(np.float32),
            "bias": rng.normal(size=6).astype(np.float32),
        }
        stats = {"mean": np.zeros(6, np.float32), "var": np.ones(6, np.float32)}
        return Variables(jax.tree.map(jnp.asarray, params), {}, jax.tree.map(jnp.asarray, stats))

    def apply(self, variables, images, sizes, *, train):
        norm = normalization(self._norm, 6, rngs=nnx.Rngs(0))
        norm.scale[...], norm.bias[...] = variables.params["scale"], variables.params["bias"]
        norm.mean[...], norm.var[...] = variables.stats["mean"], variables.stats["var"]
        norm.train()
        x = norm((images / 255) @ variables.params["kernel"])
        outputs = Outputs([jnp.sin(x)], [x**3], [])
        return outputs, {"mean": norm.mean[...], "var": norm.var[...]}


@pytest.mark.parametrize("mapping", EIGHT)
def test_synchronised_batch_norm_is_that_of_the_whole_batch(batches, mapping):
    """Statistics, and the gradient through them, which crosses devices."""
    brighter = [  # images that differ much: their own statistics are others
        b._replace(images=b.images // np.arange(1, 9, dtype=np.uint8)[:, None, None, None])
        for b in batches
    ]
    outcome = {}
    for norm, where in (("bn", "one device"), ("sync_bn", mapping), ("bn", mapping)):
        trainer = Trainer(Normalised(norm), MAPPINGS[where](), Energy())
        state, _ = trainer.run(brighter)
        outcome[norm, where] = trainer.devices.fetch_replicated(state.variables)
    first = jax.device_get(trainer.first.variables)
    expected = outcome["bn", "one device"]
    for part, before in (("params", first.params), ("stats", first.stats)):
        whole = getattr(expected, part)
        assert difference(whole, getattr(outcome["sync_bn", mapping], part), before) < 1e-4
        assert difference(whole, getattr(outcome["bn", mapping], part), before) > 1e-2


class Energy:
    """Stands for a detector and compiles at once: squared outputs, weighed by the objects."""

    def losses(self, outputs, batch, global_sum):
        squares = sum((x**2).mean((1, 2, 3)) for x in jax.tree.leaves(outputs))
        objects = batch.box_mask.sum(1)
        per_image = {"loss": squares * objects / global_sum(objects.sum())}
        return Losses({"loss": per_image["loss"].sum()}, per_image)

    def detections(self, outputs, sizes, scales):
        return outputs.cls_logits[0].max((1, 2)) * scales[:, :1]


@pytest.fixture
def quick(linear_network):
    """Makes trainers that compile at once."""
    network = linear_network(None, OutputSpec(CLASSES, 8))
    return lambda mapping: Trainer(network, MAPPINGS[mapping](), Energy())


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_mappings_agree_on_a_simple_objective(quick, batches, mapping):
    expected, found = quick("one device"), quick(mapping)
    first = jax.device_get(expected.first.variables.params)
    states = [params_of(trainer, trainer.run(batches)[0]) for trainer in (expected, found)]
    assert difference(*states, first) < 1e-5


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_after_one_step_on_each_canvas_nothing_compiles(quick, make_batch, compilations, mapping):
    trainer = quick(mapping)
    devices = trainer.devices
    canvases = [make_batch(OBJECTS, canvas) for canvas in ((64, 64), (64, 96))]
    state = devices.replicate(trainer.first)

    def step(state, batch):
        state, scalars, per_image = trainer.step(state, devices.shard(batch))
        detections = trainer.predict(state.evaluated(), devices.shard(batch))
        jax.tree.map(np.asarray, devices.fetch_replicated((scalars, state)))
        devices.fetch_sharded((per_image, detections))
        return state

    for batch in canvases:
        state = step(state, batch)
    assert compilations, "the warm-up is counted"
    before = len(compilations)
    for i in range(5):
        state = step(state, canvases[i % 2])
    assert len(compilations) == before


@pytest.mark.parametrize("mapping", EIGHT)
def test_after_its_first_step_a_real_network_compiles_nothing(
    trainers, batches, outcomes, compilations, mapping
):
    trainer = trainers[mapping]
    state = trainer.devices.replicate(trainer.first)
    compilations.clear()
    for batch in batches:
        state, scalars, _ = trainer.step(state, trainer.devices.shard(batch))
        trainer.devices.fetch_replicated((state, scalars))
    assert not compilations


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_was_fetched_stays_as_it_was(quick, batches, mapping):
    """The buffers of a state are reused by the next step; a checkpoint is still being written."""
    trainer = quick(mapping)
    devices = trainer.devices
    state = devices.replicate(trainer.first)
    fetched, copies = [], []
    for batch in batches:
        state, _, _ = trainer.step(state, devices.shard(batch))
        fetched.append(jax.tree.leaves(devices.fetch_replicated(state)))
        copies.append([np.array(leaf, copy=True) for leaf in fetched[-1]])
    for leaves, expected in zip(fetched, copies, strict=True):
        for leaf, copy in zip(leaves, expected, strict=True):
            assert isinstance(leaf, np.ndarray)
            np.testing.assert_array_equal(leaf, copy)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_step_reuses_the_buffers_of_the_state(quick, batches, mapping):
    trainer = quick(mapping)
    state = trainer.devices.replicate(trainer.first)
    trainer.step(state, trainer.devices.shard(batches[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_replicated_arrays_have_buffers_of_their_own(mapping):
    """Averaged parameters start as the parameters; a step may not be given a buffer twice."""
    devices, array = MAPPINGS[mapping](), jax.numpy.arange(1000.0)
    replicated = devices.replicate({"params": array, "ema": array})
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for leaf in (*replicated.values(), array)
        for shard in leaf.addressable_shards
    ]
    assert len(set(pointers)) == len(pointers) == 2 * devices.count + 1


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_step_transfers_nothing_to_the_devices_but_its_batch(quick, batches, mapping):
    trainer = quick(mapping)
    state = trainer.devices.replicate(trainer.first)
    with jax.transfer_guard_host_to_device("disallow"):
        for batch in batches:
            state, _, _ = trainer.step(state, trainer.devices.shard(batch))  # explicitly
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jax.jit(jax.numpy.sin)(np.ones(3))


def test_numbers_of_processes_keep_every_bit():
    devices = MAPPINGS["pmap"]()
    values = np.array([0.1, -np.inf, 2.0**53 - 1])
    np.testing.assert_array_equal(devices.gather(values), [values])
    rows = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(devices.gather_rows(rows), rows)
    assert devices.gather_rows(rows[:0]).shape == (0, 3)
    assert devices.from_first(0.1) == 0.1


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_trees_come_back_as_they_went(mapping):
    devices = MAPPINGS[mapping]()
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int32(7)}
    fetched = devices.fetch_replicated(devices.replicate(state))
    batch = {"x": np.arange(48).reshape(16, 3), "y": np.arange(16) % 3 == 0}
    double = devices.map(
        lambda state, batch: jax.tree.map(lambda x: x * np.int32(2), batch), outputs=SHARDED
    )
    doubled = devices.fetch_sharded(double(devices.replicate(state), devices.shard(batch)))
    for name, value in state.items():
        np.testing.assert_array_equal(fetched[name], value)
        assert fetched[name].shape == value.shape
    for name, value in batch.items():
        np.testing.assert_array_equal(doubled[name], value * np.int32(2))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_batches_are_on_the_devices_one_ahead(mapping):
    devices, asked = MAPPINGS[mapping](), []
    arrays = [np.arange(16.0) + i for i in range(4)]

    def loaded():
        for i in range(4):
            asked.append(i)
            yield i

    pairs = prefetch(devices, loaded(), lambda i: {"x": arrays[i]})
    for i in range(4):
        which, on_devices = next(pairs)
        assert which == i
        assert asked == list(range(min(i + 2, 4)))
        np.testing.assert_array_equal(devices.fetch_sharded(on_devices)["x"], arrays[i])
        assert len(on_devices["x"].addressable_shards) == devices.count
    assert not list(pairs)
    assert not list(prefetch(devices, [], lambda i: i))


@pytest.mark.parametrize(
    ("mapping", "kind"), [("auto", Pmap), ("pmap", Pmap), ("shard_map", ShardMap)]
)
def test_the_config_s_word_chooses_the_mapping(mapping, kind):
    devices = parallel(mapping)
    assert isinstance(devices, kind)
    assert devices.count == 8
