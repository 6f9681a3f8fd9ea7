"""The tutorial notebook: it runs from its first cell to its last, and carries no large outputs."""

import base64
import json
import re
import shlex
from pathlib import Path

import pytest

import gfl_jax
from gfl_jax.__main__ import main

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
CELLS = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


def command(line):
    """What `!gfl-jax ...` does, in this process."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert not stop.value.code, f"gfl-jax {line}: status {stop.value.code}"


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GFL_TUTORIAL_FAST", "1")
    namespace = {"command": command}
    for number, cell in enumerate(CELLS, 1):
        text = re.sub(
            r"^( *)!gfl-jax (.*)$", r'\1command(f"\2")', "".join(cell["source"]), flags=re.M
        )
        exec(compile(text, f"cell {number}", "exec"), namespace)
    said = capsys.readouterr().out
    assert "probabilities [0.0, 0.0, 0.0, 0.7, 0.3, 0.0, 0.0, 0.0]\nmean 3.3" in said
    assert "the same boxes: True" in said
    assert "AP50" in said
    assert gfl_jax.load("exported/safetensors").category_names[0] == "ellipse"
    assert (tmp_path / "exported/stablehlo/128x128.jax_export").is_file()


def test_the_notebook_is_stored_without_outputs_but_for_small_pictures():
    pictures = []
    for cell in CELLS:
        assert cell["execution_count"] is None
        for output in cell["outputs"]:
            (kind,) = output["data"]
            assert kind == "image/jpeg"
            pictures.append(base64.b64decode(output["data"][kind]))
    assert len(pictures) <= 3
    assert sum(map(len, pictures)) < 200_000
    assert all(picture.startswith(b"\xff\xd8") for picture in pictures)
