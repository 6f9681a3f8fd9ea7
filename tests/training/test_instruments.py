"""Goodput, profiles of some steps, and programs that are kept from being compiled again."""

import re
import stat
import time

import jax
import jax.numpy as jnp
import pytest

from gfl_jax.config import Train
from gfl_jax.errors import InputError
from gfl_jax.training.instruments import PHASES, Clock, Profiler, keep_compiled

# ---------------------------------------------------------------------------- goodput


def test_the_shares_of_the_phases_add_up_to_one():
    with Clock() as clock:
        with clock("steps"):
            time.sleep(0.02)
            with clock("saving"):
                time.sleep(0.04)
        time.sleep(0.01)
        shares = clock.shares()
    assert list(shares) == list(PHASES)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in shares.values())
    printed = [float(share) for share in re.findall(r"([\d.]+)%", str(clock))]
    assert len(printed) == len(PHASES)
    assert sum(printed) == pytest.approx(100)


def test_time_counts_in_the_innermost_phase_alone():
    with Clock() as clock:
        with clock("evaluating"):
            time.sleep(0.03)
            with clock("saving"):
                time.sleep(0.06)
            time.sleep(0.03)
        clock.shares()
    assert 0.06 <= clock.seconds["saving"]
    assert 0.06 <= clock.seconds["evaluating"]
    whole = sum(clock.seconds.values())
    assert clock.seconds["saving"] + clock.seconds["evaluating"] == pytest.approx(whole, rel=0.2)


def test_a_phase_that_ends_with_an_error_ends():
    with Clock() as clock, pytest.raises(ValueError, match="broken"), clock("steps"):
        raise ValueError("broken")
    before = clock.seconds["steps"]
    time.sleep(0.01)
    clock.shares()
    assert clock.seconds["steps"] == before
    assert clock.seconds["other"] >= 0.01


def test_compiling_within_a_phase_counts_as_compiling_and_once():
    def nested(x):
        for _ in range(30):
            x = jax.jit(lambda y: jnp.sin(y) + 1)(x)
        return x

    with Clock() as clock:
        began = time.perf_counter()
        with clock("steps"):
            jax.block_until_ready(jax.jit(nested)(jnp.ones(7)))
        took = time.perf_counter() - began
        shares = clock.shares()
    assert clock.seconds["compiling"] > 0.3 * took
    assert clock.seconds["compiling"] + clock.seconds["steps"] == pytest.approx(took, abs=0.01)
    assert sum(shares.values()) == pytest.approx(1)


# ---------------------------------------------------------------------------- profiles


def test_the_steps_of_the_window_are_traced_and_no_others(tmp_path):
    function = jax.jit(lambda x: x + 1)
    x = jnp.zeros(3)
    with Profiler(Train(profile="2:4").profile_steps, tmp_path) as profiler:
        for step in range(6):
            with profiler.step(step, x):
                x = function(x)
            assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 4)
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert trace.is_relative_to(tmp_path / "profile")
    assert b"step_num" in trace.read_bytes()


def test_a_trace_ends_with_the_run(tmp_path):
    with Profiler(range(0, 100), tmp_path) as profiler, profiler.step(0, ()):
        pass
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_without_a_window_nothing_is_traced(tmp_path):
    with Profiler(Train().profile_steps, tmp_path) as profiler, profiler.step(0, ()):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("window", ["20", "25:20", "20:20", "a:b", "-1:3", "1:2:3"])
def test_a_window_that_is_none_is_named(window):
    with pytest.raises(InputError, match=r"train\.profile .* give FIRST:LAST"):
        Train(profile=window)


def test_a_bucket_takes_no_profile():
    with pytest.raises(InputError, match="gs://bucket/run is a bucket"):
        Profiler(range(1, 2), "gs://bucket/run")


# ---------------------------------------------------------------------------- kept programs


@pytest.fixture
def cache_dir(monkeypatch):
    """Sets where programs are kept, for a test."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield lambda folder: jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_work_directory_for_their_owner_alone(cache_dir, tmp_path):
    cache_dir(None)
    keep_compiled(tmp_path / "run")
    folder = tmp_path / "run" / "xla_cache"
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "{file}/run"])
def test_where_none_can_be_kept_none_is(cache_dir, tmp_path, workdir):
    cache_dir(None)
    file = tmp_path / "file"
    file.write_text("in the way")
    keep_compiled(workdir.format(file=file))
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_is_configured_already_stays(cache_dir, tmp_path):
    cache_dir("/elsewhere")
    keep_compiled(tmp_path)
    assert jax.config.values["jax_compilation_cache_dir"] == "/elsewhere"
    assert not list(tmp_path.iterdir())
