import pytest
from executable import IMAGES, KERNEL, ROWS, TEXT, V5E, find

from gfl_jax.tools.preflight.costs import breakdown, category, collectives, scope_of
from gfl_jax.tools.preflight.hlo import parse


@pytest.fixture(scope="module")
def module():
    return parse(TEXT)


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(_fun)/shard_map/jvp(backbone)/conv_general_dilated", "backbone forward"),
        ("jit(_fun)/shard_map/transpose(jvp(neck))/cond/branch_0_fun/add", "neck backward"),
        ("jit(_fun)/shard_map/jvp(losses)/assign/vmap()/while", "assign forward"),
        ("jit(_fun)/shard_map/optimizer/mul", "optimizer"),
        ("jit(_fun)/shard_map/broadcast.88", ""),
        ("backbone.layer1", ""),
    ],
)
def test_scopes_tell_module_and_direction(op_name, scope):
    assert scope_of(op_name) == scope


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("top_k.94", "detections"),
        ("fusion.1", "neck forward"),  # by what is inside
        ("copy.1", "neck forward"),  # by what is copied
        ("fusion.3", "losses forward"),
        ("copy-done.1", "other"),
    ],
)
def test_what_the_compiler_made_up_belongs_where_its_work_does(module, name, expected):
    assert category(module, *find(module, name)) == expected


def test_collectives_add_up_and_take_the_time_of_a_ring(module):
    gradients, count = collectives(module, V5E, 8)
    assert (gradients.kind, gradients.dtype, gradients.count) == ("all-reduce", "f32", 1)
    assert gradients.size == KERNEL + 64
    assert gradients.seconds == pytest.approx(2 * 3 / 4 * gradients.size / V5E.ring_bandwidth)
    assert (count.dtype, count.size, count.chips) == ("s32", 4, 8)


def test_one_chip_sends_nothing():
    alone = parse(TEXT.replace("{{0,1,2,3}}", "{{0}}"))
    assert collectives(alone, V5E, 1)[0].seconds == 0


def test_time_is_the_longer_of_compute_and_memory_of_each_instruction(module):
    found = breakdown(module, V5E)
    neck, assign = found.parts
    convolution, copy = 3_000_000 / V5E.clock, 2 * IMAGES / V5E.hbm_bandwidth
    assert (neck.name, neck.count) == ("neck forward", 2)
    assert neck.seconds == pytest.approx(convolution + copy)
    assert neck.hbm_bytes == 4 * IMAGES
    assert (assign.name, assign.count) == ("assign forward", 9)
    assert assign.seconds == pytest.approx(9 * 1500 / V5E.clock)
    assert found.seconds == pytest.approx(neck.seconds + assign.seconds)
    assert found.longest[0].name == "fusion.1 (compute, neck forward): "
    assert found.longest[1].name.startswith("copy.1 (memory")
    assert (found.copies.count, found.copies.hbm_bytes) == (1, KERNEL)
    assert found.unknown_loops == 0


def test_instructions_without_an_estimate_are_listed_apart(module):
    unknown = {part.name: part for part in breakdown(module, V5E).unknown}
    assert unknown["sort (detections)"].count == 1
    assert unknown["sort (detections)"].hbm_bytes == 4 * ROWS
    assert unknown["fusion of gather (losses forward)"].count == 1
    assert unknown["dynamic-update-slice (assign forward)"].count == 9
    assert not any(name.startswith(("add", "all-reduce", "Alloc")) for name in unknown)
