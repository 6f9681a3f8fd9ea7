import os
import threading
from pathlib import Path

import pytest

from gfl_jax.errors import InputError, WriteError
from gfl_jax.paths import as_path, is_remote, local_path, write


def test_a_local_path_stays_what_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(as_path("runs/a")) == "runs/a"
    assert os.fspath(as_path(Path("/runs/a"))) == "/runs/a"
    assert os.fspath(as_path("~/runs")) == str(tmp_path / "runs")
    assert not is_remote(as_path("~/runs"))


def test_a_bucket_is_no_local_folder():
    pytest.importorskip("gcsfs")
    path = as_path("gs://bucket/run")
    assert os.fspath(path / "best") == "gs://bucket/run/best"
    assert os.fspath((path / "best").parent) == "gs://bucket/run"
    assert is_remote(path)
    assert not is_remote("runs/a")


@pytest.mark.parametrize("path", ["s3://bucket/run", "https://host/run"])
def test_another_kind_of_storage_is_named(path):
    with pytest.raises(InputError, match=path):
        as_path(path)


def test_a_reader_never_sees_half_a_file(tmp_path):
    """Nor no file at all, while it is written again and again."""
    file, done, sizes = tmp_path / "file", threading.Event(), set()
    write(file, "x" * 100)

    def read():
        while not done.is_set():
            sizes.add(len(file.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    for size in [1 << 20, 100] * 20:
        write(file, b"x" * size)
    done.set()
    reader.join()
    assert sizes <= {100, 1 << 20}
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "in the way").write_text("")
    with pytest.raises(WriteError, match=r"in the way/file could not be written: Not a directory"):
        write(tmp_path / "in the way" / "file", "")


def test_what_must_be_local_is_named_by_its_argument(tmp_path):
    assert local_path(str(tmp_path), "SRC") == tmp_path
    assert local_path("~/x", "SRC") == Path.home() / "x"
    with pytest.raises(InputError, match=r"--checkpoint is gs://bucket/x\.pth"):
        local_path("gs://bucket/x.pth", "--checkpoint")
