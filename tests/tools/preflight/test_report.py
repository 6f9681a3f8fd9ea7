import dataclasses
import json

import pytest
from executable import TEXT, V5E

from gfl_jax.tools.preflight.compile import Job, Memory, OutOfMemory, Program, needed_and_available
from gfl_jax.tools.preflight.costs import Collective, Part, breakdown
from gfl_jax.tools.preflight.hlo import parse
from gfl_jax.tools.preflight.report import comparison, markdown, to_json, verdict
from gfl_jax.tools.preflight.topology import GIB


@pytest.fixture(scope="module")
def module():
    return parse(TEXT)


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (46.5G) exceeds available HBM (15.75G).",
            (46.5 * GIB, 15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.",
            (20.25 * GIB, 15.75 * GIB),
        ),
        ("RESOURCE_EXHAUSTED: hbm", None),
    ],
)
def test_an_out_of_memory_answer_says_what_is_needed_and_what_there_is(message, sizes):
    assert needed_and_available(message) == sizes
    refused = OutOfMemory(Job("train step", 64, V5E, 4), 1.0, message)
    assert "does not fit" in verdict(refused)
    assert message in markdown(refused)
    if sizes:
        assert f"{sizes[0] / GIB:.2f} GiB" in verdict(refused)
    assert to_json(refused)["fits"] is False
    assert "No train step fits" in comparison([refused])


def program(module, images, *, temporaries=2 * GIB, chips=4):
    return Program(
        Job("train step", images, V5E, chips),
        compile_seconds=60.0,
        memory=Memory(3 * GIB, 3 * GIB, 3 * GIB, temporaries, 0),
        flops=1e12,
        bytes_accessed=1e10,
        collectives=[Collective("all-reduce", "f32", 1, 1000, chips, 0.001)],
        breakdown=breakdown(module, V5E),
    )


def test_donated_arguments_are_counted_once(module):
    assert program(module, 2).memory.total == 5 * GIB
    assert program(module, 2).free == 11 * GIB


def test_the_answer_says_whether_it_fits_how_fast_and_why(module):
    found = program(module, 2)
    assert found.seconds == pytest.approx(found.breakdown.seconds + 0.001)
    text = verdict(found)
    assert "fits: 5.00 GiB of 16.00 GiB, 69% free" in text
    assert f"{2 / found.seconds:.1f} images/s per chip, {8 / found.seconds:.0f} on 4" in text
    assert "neck forward" in text
    assert "does not fit: 23.00 GiB" in verdict(program(module, 2, temporaries=20 * GIB))


def test_memory_is_the_bound_where_copies_move_more_than_instructions(module):
    found = program(module, 2)
    slow = dataclasses.replace(found.breakdown, copies=Part("copies", 1, 1.0, int(819e9)))
    assert dataclasses.replace(found, breakdown=slow).seconds == pytest.approx(1.001, rel=1e-2)


def test_the_comparison_names_the_fastest_batch_that_fits(module):
    table = comparison(
        [program(module, 2), program(module, 8), program(module, 16, temporaries=20 * GIB)]
    )
    assert "The fastest train step that fits: 8 images per chip" in table
    assert table.count("\n| train step |") == 3


def test_the_report_shows_all_and_json_keeps_it(module):
    found = program(module, 2)
    text = markdown(found)
    for part in ("all-reduce", "neck forward", "sort (detections)", "matrix units: 1000 GFLOP"):
        assert part in text
    values = json.loads(json.dumps(to_json(found)))
    assert values["fits"] is True
    assert values["images_per_second"] == pytest.approx(4 * 2 / found.seconds)
    assert values["breakdown"]["parts"][0]["name"] == "neck forward"
