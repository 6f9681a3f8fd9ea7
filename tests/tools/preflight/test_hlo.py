import pytest
from executable import IMAGES, KERNEL, ROWS, TEXT, find

from gfl_jax.tools.preflight.hlo import arrays_of, executed, hbm_bytes, parse, trip_count


@pytest.fixture(scope="module")
def module():
    return parse(TEXT)


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
