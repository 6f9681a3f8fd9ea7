import sys
from pathlib import Path

import numpy as np
import pytest

from gfl_jax.cli import plain_errors
from gfl_jax.config import Data, load_experiment
from gfl_jax.data.images import scale_boxes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Data(flip=2), "error: data.flip is 2"),
        (lambda: load_experiment("no.py"), "no.py"),
        (lambda: Path("missing.json").read_bytes(), "missing.json"),
    ],
)
def test_what_a_user_can_mend_is_a_message(mistake, message):
    with pytest.raises(SystemExit, match=message), plain_errors():
        mistake()


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"), plain_errors():
        int("x")
    with pytest.raises(KeyError), plain_errors():
        {}["x"]
    # This traceback ends in our code, but not at a raise.
    with pytest.raises(ValueError, match="broadcast"), plain_errors():
        scale_boxes(np.zeros((2, 4)), np.ones(3), (8, 8))
    with pytest.raises(ValueError, match="neither"), plain_errors():
        raise ValueError("of a file that is neither ours nor the script")


def test_the_script_that_was_started_counts_as_ours(monkeypatch):
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises(SystemExit, match="mistake"), plain_errors():
        raise ValueError("a mistake")
