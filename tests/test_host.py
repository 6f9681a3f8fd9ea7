import sys

import pytest

from gfl_jax.config import Data, load_experiment
from gfl_jax.host import plain_errors


@pytest.mark.parametrize(
    ("mistake", "message"),
    [(lambda: Data(flip=2), "error: data.flip is 2"), (lambda: load_experiment("no.py"), "no.py")],
)
def test_an_error_of_ours_is_a_message(mistake, message):
    with pytest.raises(SystemExit, match=message), plain_errors():
        mistake()


def test_an_error_of_others_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="invalid literal"), plain_errors():
        int("x")
    with pytest.raises(KeyError), plain_errors():
        {}["x"]
    # The script that was started counts as ours.
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises(SystemExit, match="invalid literal"), plain_errors():
        int("x")
