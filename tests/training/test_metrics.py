import json
import sys
import time

import numpy as np
import pytest
from tensorboardX.record_writer import RecordWriter

from gfl_jax.errors import WriteError
from gfl_jax.training import metrics
from gfl_jax.training.metrics import MetricsLog, read_metrics


def written(folder, steps, start=0):
    log = MetricsLog(folder, start)
    for step in steps:
        log.write("train", step, {"loss": step / 10})
    log.close()


def steps_of(folder):
    return [entry["step"] for entry in read_metrics(folder)]


def test_entries_are_lines_of_json_in_order(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write("train", 1, {"loss": 0.1, "lr": 1e-5})
    log.write("val", 1, {"AP": -1})
    log.flush()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = [
        {"kind": "train", "step": 1, "loss": 0.1, "lr": 1e-5},
        {"kind": "val", "step": 1, "AP": -1.0},
    ]
    assert [json.loads(line) for line in lines] == expected == read_metrics(tmp_path)
    log.close()


def test_the_last_entry_of_a_kind_may_be_of_an_earlier_process(tmp_path):
    written(tmp_path, [1, 2])
    log = MetricsLog(tmp_path, 2)
    assert log.last("val") == {}
    log.write("val", 3, {"AP": 0.5}, data="a key")
    assert log.last("val") == {"kind": "val", "step": 3, "AP": 0.5, "data": "a key"}
    assert log.last("train")["step"] == 2
    log.close()
    assert MetricsLog(tmp_path, 3).last("val")["data"] == "a key"


def test_continuing_drops_entries_after_the_checkpoint(tmp_path):
    written(tmp_path, [1, 2, 3, 4, 5])
    written(tmp_path, [4, 5, 6], start=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    written(tmp_path, [1], start=0)
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path, cut):
    written(tmp_path, [1, 2, 3])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-cut])
    kept = [1, 2, 3] if cut == 1 else [1, 2]  # without its newline a line is still whole
    assert steps_of(tmp_path) == kept
    written(tmp_path, [4], start=3)
    assert steps_of(tmp_path) == [*kept, 4]


def test_a_damaged_line_loses_no_other(tmp_path):
    written(tmp_path, [1, 2, 3, 4])
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    lines[1] = lines[1][:9]
    others = b"3", b'{"kind": "train", "step": "x"}', b'{"step": null, "kind": "val"}', b"\x80\xfe"
    lines[3:3] = others
    file.write_bytes(b"\n".join(lines))
    assert steps_of(tmp_path) == [1, 3, 4]
    written(tmp_path, [5], start=4)
    assert steps_of(tmp_path) == [1, 3, 4, 5]


def test_entries_are_there_soon_for_who_watches_a_run(tmp_path):
    log = MetricsLog(tmp_path, 0)
    deadline, step = time.monotonic() + 20, 0
    while not steps_of(tmp_path) and time.monotonic() < deadline:
        step += 1
        log.write("train", step, {"loss": 0.1})
        time.sleep(0.01)
    assert steps_of(tmp_path)
    log.close()


def test_writing_the_file_takes_little_of_the_time(tmp_path, monkeypatch):
    """However slow the storage is."""
    now, writes = [0.0], []

    def slow_write(file, content):
        now[0] += 0.2
        writes.append(now[0])

    monkeypatch.setattr(metrics, "write", slow_write)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    log = MetricsLog(tmp_path, 0)
    for step in range(10_000):
        now[0] += 0.1
        log.write("train", step + 1, {"loss": 0.1})
    assert len(writes) * 0.2 < 0.012 * now[0]
    assert max(np.diff(writes)) < 21
    log.close()


def test_no_file_is_no_entries(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path) == []


def test_values_that_are_not_finite_are_kept_but_not_plotted(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write("train", 1, {"loss": float("nan"), "lr": float("inf")})
    log.close()
    (entry,) = read_metrics(tmp_path)
    assert entry["loss"] != entry["loss"]
    assert entry["lr"] == float("inf")


def test_without_tensorboard_the_numbers_are_still_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = MetricsLog(tmp_path, 0)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert [entry["loss"] for entry in read_metrics(tmp_path)] == [1.0]
    assert "gfl-jax[tensorboard]" in capsys.readouterr().out


def test_events_that_cannot_be_written_end_the_run_with_their_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)
    full = RecordWriter("/dev/full")
    monkeypatch.setattr(log._loggers._open["tensorboard"], "_file", full)
    for step in range(20):
        with pytest.raises(WriteError, match=r"tensorboard/events.*: No space left on device"):
            log.write("train", step, {"loss": 1.0})
            log.flush()
    with pytest.raises(WriteError):
        log.close()
    assert full._writer.closed
    assert len(read_metrics(tmp_path)) == 20


def test_tensorboard_events_are_written(tmp_path):
    written(tmp_path, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
