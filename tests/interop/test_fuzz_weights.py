"""A short run of the fuzz of checkpoints; `python tests/fuzz_weights.py` is the long one."""

import fuzz_weights


def test_damaged_and_odd_checkpoints_are_refused_in_plain_words_or_read_right():
    counts, failures = fuzz_weights.fuzz(count=20, seed=0)
    assert not failures, "\n".join(failures)
    assert counts["refused"] > 5 and counts["read"] > 5
