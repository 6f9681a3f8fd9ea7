"""Two runs in one work directory."""

import multiprocessing
import os
import socket

import numpy as np
import pytest

from gfl_jax.distributed import parallel
from gfl_jax.errors import InputError
from gfl_jax.training import lock
from gfl_jax.training.lock import held


def test_the_second_start_says_who_holds_the_work_directory(tmp_path):
    devices = parallel("pmap")
    with held(tmp_path / "run", devices):
        holder = rf"process {os.getpid()} on {socket.gethostname()} since 20.*another --workdir"
        with pytest.raises(InputError, match=holder), held(tmp_path / "run", devices):
            pass
        with held(tmp_path / "other", devices):
            pass
    with held(tmp_path / "run", devices):
        pass


def _hold_and_die(folder, ready):
    with lock._lock(folder):
        ready.set()
        os.kill(os.getpid(), 9)


def test_the_lock_dies_with_its_holder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold_and_die, args=(tmp_path, ready))
    process.start()
    process.join(120)
    assert ready.is_set()
    assert process.exitcode == -9
    with lock._lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / lock.FILE).read_text()


def test_what_stops_the_first_process_stops_all(tmp_path, monkeypatch):
    """The first one's word reaches the others, which would wait for it otherwise."""
    devices = parallel("pmap")
    monkeypatch.setattr(lock, "is_first", lambda: False)
    monkeypatch.setattr(type(devices), "gather", lambda self, values: np.array([[1.0], values]))
    with pytest.raises(InputError, match="process 0 cannot use"), held(tmp_path / "run", devices):
        pass
    assert not (tmp_path / "run").exists()


def test_in_a_bucket_a_note_warns(tmp_path, capsys):
    with lock._note(tmp_path):
        assert capsys.readouterr().out == ""
        with lock._note(tmp_path):
            printed = capsys.readouterr().out
            assert f"process {os.getpid()} on" in printed
            assert "cannot be locked" in printed
    assert not (tmp_path / lock.FILE).exists()
