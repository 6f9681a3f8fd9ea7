"""A few of the mutated files of tests/fuzz_data.py; it has the same for thousands."""

import fuzz_data
import pytest


@pytest.mark.parametrize(
    ("case", "count"), [(fuzz_data.annotation_case, 30), (fuzz_data.image_case, 20)]
)
def test_mutated_files_are_refused_or_the_report_adds_up(case, count):
    outcomes, failures = fuzz_data.fuzz(case, count, seed=7)
    assert not failures
    assert outcomes.total() == count
    assert len(outcomes) > 1, "all of them ended alike"
