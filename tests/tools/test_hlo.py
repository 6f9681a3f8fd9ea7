"""Reading what the compiler for TPUs wrote: a small executable whose numbers are known."""

import pytest

from gfl_jax.tools.preflight.hlo import (
    CHIPS,
    arrays_of,
    breakdown,
    category,
    collectives,
    executed,
    hbm_bytes,
    parse,
    scope_of,
    trip_count,
)

V5E = CHIPS["v5e"]

# Cut from what the compiler writes for a small step: names and layouts are its own.
TEXT = """\
HloModule jit__fun, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

FileNames
1 "step.py"

%fused_computation.1 (param_0: bf16[8,64,64,128], param_1: f32[3,3,128,128]) -> bf16[8,64,64,128] {
  %param_0 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)} parameter(1)
  %convert.1 = bf16[3,3,128,128]{3,2,1,0:T(8,128)(2,1)} convert(%param_1), metadata={op_name="jit(_fun)/shard_map/jvp(neck)/convert_element_type"}
  ROOT %convolution.1 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} convolution(%param_0, %convert.1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(_fun)/shard_map/jvp(neck)/conv_general_dilated"}
}

%fused_computation.2 (param_0.2: f32[100,1024], param_1.2: s32[]) -> f32[1,1024] {
  %param_0.2 = f32[100,1024]{1,0:T(8,128)} parameter(0)
  %param_1.2 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%param_0.2, %param_1.2), dynamic_slice_sizes={1,1024}
}

%fused_computation.3 (param_0.3: s32[2,86]) -> s32[2,86] {
  %param_0.3 = s32[2,86]{1,0:T(2,128)} parameter(0)
  %custom-call.3 = s32[2,86,2]{2,1,0:T(8,128)} custom-call(%param_0.3), custom_call_target="GatherScatterIndicesBitpacked", metadata={op_name="jit(_fun)/shard_map/jvp(losses)/jit(take_along_axis)/gather"}
  ROOT %gather.13 = s32[2,86]{1,0:T(2,128)} gather(%param_0.3, %custom-call.3), offset_dims={}, slice_sizes={1,1}
}

%region_6.7 (wide.param.448: (s32[], f32[100,1024])) -> pred[] {
  %constant.431 = s32[]{:T(128)} constant(9)
  %wide.param.448 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.3276 = s32[]{:T(128)} get-tuple-element(%wide.param.448), index=0
  ROOT %lt.182 = pred[]{:T(512)} compare(%get-tuple-element.3276, %constant.431), direction=LT
}

%region_4.6 (wide.param.449: (s32[], f32[100,1024])) -> (s32[], f32[100,1024]) {
  %constant.329 = s32[]{:T(128)} constant(1)
  %wide.param.449 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param.449), index=0
  %get-tuple-element.2 = f32[100,1024]{1,0:T(8,128)} get-tuple-element(%wide.param.449), index=1
  %fusion.2 = f32[1,1024]{1,0:T(1,128)S(1)} fusion(%get-tuple-element.2, %get-tuple-element.1), kind=kLoop, calls=%fused_computation.2, metadata={op_name="jit(_fun)/shard_map/jvp(losses)/assign/vmap()/while/body/dynamic_slice"}, backend_config={"window_config":{"estimated_cycles":"1500"}}
  %dynamic-update-slice.1 = f32[100,1024]{1,0:T(8,128)} dynamic-update-slice(%get-tuple-element.2, %fusion.2, %get-tuple-element.1)
  %add.1 = s32[]{:T(128)} add(%get-tuple-element.1, %constant.329)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) tuple(%add.1, %dynamic-update-slice.1)
}

ENTRY %main.1_spmd (param.1: bf16[8,64,64,128], param.2: f32[3,3,128,128], param.3: f32[100,1024]) -> bf16[8,64,64,128] {
  %param.1 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %param.2 = f32[3,3,128,128]{3,2,1,0:T(8,128)} parameter(1)
  %param.3 = f32[100,1024]{1,0:T(8,128)} parameter(2)
  %copy-start.1 = (f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)}, f32[3,3,128,128]{3,2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%param.2), cross_program_prefetch_index=0
  %copy-done.1 = f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %fusion.1 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} fusion(%param.1, %copy-done.1), kind=kOutput, calls=%fused_computation.1, backend_config={"window_config":{"estimated_cycles":"3000000"}}
  %copy.1 = bf16[8,64,64,128]{3,0,2,1:T(8,128)(2,1)} copy(%fusion.1), backend_config={"window_config":{"estimated_cycles":"100"}}
  %constant.1 = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) tuple(%constant.1, %param.3)
  %while.1 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) while(%tuple.2), condition=%region_6.7, body=%region_4.6
  %get-tuple-element.9 = f32[100,1024]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %top_k.94 = (f32[100,1024]{1,0:T(8,128)}, s32[100,1024]{1,0:T(8,128)}) sort(%get-tuple-element.9, %get-tuple-element.9), dimensions={1}, to_apply=%region_6.7, metadata={op_name="jit(_fun)/shard_map/detections/vmap()/top_k"}
  %custom-call.1 = s32[2,86]{1,0:T(2,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.3 = s32[2,86]{1,0:T(2,128)S(1)} fusion(%top_k.94), kind=kCustom, calls=%fused_computation.3
  %all-reduce.35 = (f32[16]{0:T(128)S(1)}, /*index=1*/f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)}) all-reduce(%copy-done.1, %copy-done.1), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_6.7
  %psum.836 = s32[]{:T(128)} all-reduce(%constant.1), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%region_6.7
  ROOT %bitcast.1 = bf16[8,64,64,128]{3,0,2,1:T(8,128)(2,1)} bitcast(%copy.1)
}
"""  # noqa: E501
IMAGES = 8 * 64 * 64 * 128 * 2
KERNEL = 3 * 3 * 128 * 128 * 4
ROWS = 104 * 1024 * 4  # 100, padded to tiles of 8


@pytest.fixture(scope="module")
def module():
    return parse(TEXT)


def find(module, name):
    """A computation and the instruction of this name in it."""
    return next((c, c[name]) for c in module.computations.values() if name in c)


def test_sizes_are_padded_to_tiles_in_the_order_of_the_layout():
    (buffer,) = arrays_of("f32[3,3,32,3]{2,3,1,0:T(4,128)}")
    assert buffer.size == 3 * 3 * 32 * 3 * 4
    assert buffer.padded == 3 * 3 * 128 * 4 * 4
    (buffer,) = arrays_of("bf16[16]{0:T(256)(128)(2,1)S(1)}")
    assert (buffer.size, buffer.padded) == (32, 512)


def test_a_tuple_is_its_arrays_and_tells_what_lies_in_the_chips_memory():
    arrays = arrays_of(
        "(pred[2,64]{1,0:T(4,128)(4,1)S(1)}, /*index=1*/s32[], u8[4]{0}, f8e4m3fn[8])"
    )
    assert [a.dtype for a in arrays] == ["pred", "s32", "u8", "f8e4m3fn"]
    assert [a.size for a in arrays] == [128, 4, 4, 8]
    assert [a.in_hbm for a in arrays] == [False, True, True, True]


def test_instructions_have_types_operands_and_estimates(module):
    assert module.entry == "main.1_spmd"
    _, fusion = find(module, "fusion.1")
    assert (fusion.opcode, fusion.cycles) == ("fusion", 3_000_000)
    assert fusion.operands == ["param.1", "copy-done.1"]
    assert fusion.computations("calls") == ["fused_computation.1"]
    _, reduce = find(module, "all-reduce.35")
    assert reduce.opcode == "all-reduce"
    assert [a.shape for a in arrays_of(reduce.type)] == [(16,), (3, 3, 128, 128)]
    assert reduce.cycles is None


def test_a_text_that_is_not_an_executable_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")


def test_loops_are_counted_by_the_constant_in_their_condition(module):
    _, loop = find(module, "while.1")
    assert trip_count(module, loop) == 9
    known = loop._replace(attributes='backend_config={"known_trip_count":{"n":"100"}}')
    assert trip_count(module, known) == 100
    unknown = parse(TEXT.replace("constant(9)", "parameter(1)"))
    assert trip_count(unknown, find(unknown, "while.1")[1]) is None


def test_what_a_loop_holds_runs_as_often_as_it_turns(module):
    times = {each.name: count for _, each, count in executed(module)}
    assert (times["fusion.1"], times["fusion.2"]) == (1, 9)
    assert "convolution.1" not in times  # a part of fusion.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fusion.1", 2 * IMAGES),  # the kernel lies in the core
        ("copy-start.1", KERNEL),  # from the chip's memory to the core
        ("fusion.2", 1024 * 4 + 4),  # one row of 100 and its index; the result stays in the core
        ("dynamic-update-slice.1", 1024 * 4 + 4),  # in place
        ("top_k.94", 4 * ROWS),
    ],
)
def test_traffic_is_what_really_moves(module, name, expected):
    assert hbm_bytes(module, *find(module, name)) == expected


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
