"""Every command line and every program in README.md and docs/*.md is right.

Each runs as it stands, in a folder of its own in which the names that the pages use exist: RUN,
PHOTOS, street.jpg (`world`). Flags that make it short are appended (`shortened`). What cannot run
here is listed with the reason in `READ_ONLY`: its flags are still read by the command's own parser.
What is neither a call of this package nor a program is listed in `NOT_OURS` and `NO_COMMANDS`. So a
new line in the documentation is run, until somebody says why not.
"""

import functools
import importlib
import itertools
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from documents import (
    PAGES,
    ROOT,
    blocks,
    calls,
    expanded,
    flags_of_command,
    inline,
    lines,
    unknown_flags,
)

from gfl_jax.__main__ import COMMANDS, main
from gfl_jax.cli import load_experiment, parse_command
from gfl_jax.data.shapes.dataset import Shapes, make_shapes
from gfl_jax.data.shapes.render import CLASSES
from gfl_jax.models.network import Network
from gfl_jax.run import describe, load
from gfl_jax.train import TrainCommand
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.start import check

READ_ONLY = {
    "tables ": "trains rows with a budget of its own; tests/tools/test_tables.py runs it",
    "preflight ": "compiles for TPUs, for minutes; tests/tools/preflight run it small",
    "--hosts.start always": "needs a pod",
    "--hosts.coordinator": "two processes; tests/test_hosts.py runs them",
    "prepare VOC2007 ": "tests/tools/test_prepare_command.py runs it on such a folder",
    "--train.log.to tensorboard wandb": "an account; tests/training/test_loggers.py has its own",
    "push RUN OWNER/NAME": "an account; tests/tools/test_push.py pushes to a small hub",
    "crosscheck ": "needs mmdetection; tests/interop/test_crosscheck.py has its numbers",
}
"""Part of a command line: why it is not run."""

NOT_OURS = {
    "python -m venv": "a new environment, which is filled from the network",
    "pip install": "from the network; that its extras exist is tested below",
    "python benchmarks/gpu.py": "minutes; tests/test_benchmarks.py runs it small",
    "gcloud compute tpus": "needs a pod",
    "gcloud storage": "needs a bucket",
    "#!/bin/bash": "Slurm",
    "#SBATCH": "Slurm",
    "[ $? -eq 75 ] && scontrol": "Slurm",
    "for i in 0 1; do": "around a call",
    "done; wait": "around a call",
}
"""How a line for a shell begins that holds no call of this package: what it is."""

NO_COMMANDS = {
    "disk -> data": "a sketch",
    "workers x 2 x": "a formula",
    "killed 20 times": "what a program printed",
    "images of 640 x 480 pixels": "what a program printed",
    "VOC2007/Annotations": "a folder",
    "data.yaml             train:": "a folder",
    "annotations.xml": "a folder",
    "project-1.json": "a folder",
}
"""How a block begins that nobody would type: what it is."""

TO_THE_END = ("train", "train my_config.py")
"""Trainings that are run to the end. Others stop before their first step, with data and weights
ready: each would compile for a minute what these two have."""

OTHERS_FLAGS = {
    "--help": "what tyro adds to every command",
    "--shm-size": "docker",
    "--logdir": "TensorBoard",
    "--only": "benchmarks/gpu.py",
    "--trace": "benchmarks/gpu.py",
    "--ipc": "docker",
    "--slow": "pytest",
    "--reference-dir": "pytest",
    "--xla-allow-excess-precision": "XLA",
}
"""Flags in sentences that belong to other programs."""

SETUP = {
    "jax.export.deserialize": "export RUN -o shapes --format stablehlo --canvas 128 128",
    "onnxruntime": "export RUN -o shapes --format onnx --canvas 128 128",
    "convert gfl_r50.pth": "export RUN -o gfl_r50.pth --format mmdet",
}
"""Part of a program or command: what makes the file that it needs."""

ABOUT = ("README.md", "differences.md", "performance.md", "tables.md")
"""Pages to read rather than to work with."""

TINY = (
    "--model.backbone.depth=18 --model.backbone.width=8 --model.backbone.norm=bn "
    "--model.backbone.frozen-stages=-1 --model.backbone.pretrained= --model.neck.width=32 "
    "--model.head.width=32 --model.head.stacked-convs=1 --data.scale 64 64 --data.workers=0 "
    "--data.cache-dir=cache --train.epochs=1 --train.batch-size=16 --train.warmup-steps=1 "
    "--train.eval-batch=1 --detector.inference.score-threshold=0 --detector.inference.nms-pre=600"
).split()

BLOCKS = [block for page in PAGES for block in blocks(page.name, page.read_text())]
SHELL = [
    line
    for block in BLOCKS
    if not block.is_python and not block.text.lstrip().startswith(tuple(NO_COMMANDS))
    for line in lines(block)
]
CALLS = {
    " ".join(words): words for line in SHELL for call in calls(line) for words in expanded(call)
}
PROGRAMS = [block for block in BLOCKS if block.is_python]


def reason_not_to_run(text):
    return next((reason for part, reason in READ_ONLY.items() if part in f"{text} "), None)


# --------------------------------------------------------------------------- where commands run


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with all that the pages name, made by the commands that the pages describe."""
    folder = tmp_path_factory.mktemp("documents")
    shapes = make_shapes(folder / "made", Shapes(12, 0, (64, 64), blurred=1.0))
    images, annotations = shapes / "train", shapes / "annotations" / "instances_train.json"
    coco = "annotations/instances_{}2017.json", "{}2017"
    layouts = {
        "COCO": (*coco, "train", "val"),
        "FOLDER": (*coco, "train", "val"),
        "BCCD": ("annotations/instances_{}.json", "{}", "trainval", "test"),
        "PHOTOS": ("{}.json", "photos", "train", "val"),
    }
    for name, (json, images_of, *splits) in layouts.items():
        for split in splits:
            shutil.copytree(images, folder / name / images_of.format(split), dirs_exist_ok=True)
            (folder / name / json.format(split)).parent.mkdir(exist_ok=True)
            shutil.copy(annotations, folder / name / json.format(split))
    for name in ("street.jpg", "photo.jpg", "IMAGE"):
        shutil.copy(images / "000000.jpg", folder / name)
    for block in PROGRAMS:
        if named := re.match(r"# (\w+\.py)\n", block.text):
            (folder / named[1]).write_text(block.text)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(["prepare", "COCO", "DST"])
    for source, target in {"DST": "FOLDER", "COCO": "SRC", "PHOTOS": "SRC"}.items():
        shutil.copytree(folder / source, folder / target, dirs_exist_ok=True)
    shutil.copytree(folder / "DST", folder / "coco")  # in the bucket
    for seed, name in enumerate(("RUN", "OTHER")):
        save_run(folder / name, seed)
    for name in ("runs/mine", "run"):
        shutil.copytree(folder / "RUN", folder / name)
    return folder


def save_run(folder, seed):
    """A work directory of a detector with random weights: training one would take a minute."""
    ours = ["--data.source=CocoFolder", "--data.root=COCO", *TINY]
    default = TrainCommand("", load_experiment("gfl_r18_fpn_shapes"))
    experiment = parse_command(default, ours, "train", None).experiment
    network = Network(experiment.model, experiment.detector.predicts(len(CLASSES)))
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(
        lambda x: np.asarray(0.1 * rng.normal(size=x.shape), x.dtype),
        jax.eval_shape(lambda: network.init(0)),
    )
    weights.stats.update({name: np.ones_like(x) for name, x in weights.stats.items()})
    # Boxes of about the size of the objects, some of which they overlap.
    bell = -0.5 * (np.arange(17) - 2.1) ** 2
    ones = {name: np.float32(1) for name in weights.params if ".scales." in name}
    weights.params.update(ones)
    weights.params["bbox_head.gfl_reg.bias"] = np.tile(bell, 4).astype(np.float32)
    with Checkpoints(folder / "best") as checkpoints:
        about = describe(experiment, list(range(1, 1 + len(CLASSES))), list(CLASSES))
        checkpoints.save(5, {"weights": weights}, about | {"AP": 0.0})


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy of it, in which a command may write; the current directory."""
    folder = shutil.copytree(made, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def run(words):
    """Runs a command, which must succeed."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code, f"status {stop.value.code}"


def shortened(words):
    """A command line in this folder: a bucket is a folder, and training is short."""
    names = {"CONFIG": "gfl_r18_fpn_shapes"}
    words = [names.get(word, word.replace("gs://BUCKET/", "")) for word in words]
    if words[0] != "train":
        return words
    ours = {"--data.root", "--data.prepared"} & set(words)
    shapes = (
        [] if ours else ["--data.num-train=8", "--data.num-val=8", "--data.image-size=64", "64"]
    )
    kept = [flag for flag in TINY if "cache-dir" not in flag or "--data.prepared" not in words]
    return [*words, *kept, *shapes]


def clear(words):
    """Removes what a command is going to make, which the others find."""
    makes = [b for a, b in itertools.pairwise(words) if a in ("-o", "--workdir")]
    makes += words[2:3] if words[0] in ("convert", "prepare") else []
    for name in makes:
        shutil.rmtree(name, ignore_errors=True)
        Path(name).unlink(missing_ok=True)


def needed(text):
    """Skips a test that needs an optional package which is not installed."""
    for part, package in {
        ".pth": "torch",
        "mmdet": "torch",
        "onnx": "onnx",
        "onnxruntime": "onnxruntime",
        "report ": "hotcoco",
        "compare ": "hotcoco",
        "clip.mp4": "av",
    }.items():
        if part in text:
            pytest.importorskip(package)


def prepare_for(text):
    """Makes the files that a program or a command needs, beside those of the `world`."""
    for part, command in SETUP.items():
        if part in text:
            run(command.split())


def write_clip(file):
    av = pytest.importorskip("av")
    with av.open(file, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------- the tests


def until_the_first_step(
    _, detector, data, train, *, train_split, val_split, devices, initial, **__
):
    """What `fit` does before it trains."""
    check(train, devices, train_split, val_split)
    initial()


def costly(block):
    """A program as a parameter; one that needs an export is slow."""
    slow = [pytest.mark.slow] * any(part in block.text for part in SETUP)
    return pytest.param(block, id=block.place, marks=slow)


@pytest.mark.slow
@pytest.mark.parametrize("text", [t for t in CALLS if not reason_not_to_run(t)])
def test_a_documented_command_runs(text, world, monkeypatch):
    needed(text)
    if text.startswith("train") and text not in TO_THE_END:
        monkeypatch.setattr("gfl_jax.train.fit", until_the_first_step)
        monkeypatch.setattr("gfl_jax.train.finish", lambda *_: None)
    if "clip.mp4" in text:
        write_clip("clip.mp4")
    prepare_for(text)
    words = shortened(CALLS[text])
    clear(words)
    run(words)


@pytest.mark.parametrize("block", [costly(block) for block in PROGRAMS])
def test_a_documented_program_runs(block, world):
    needed(block.text)
    prepare_for(block.text)
    exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})


opened = functools.cache(load)


def read_by_its_parser(words, monkeypatch):
    """Hands a command line to the parser of its command, and stops there."""
    module, _, function = COMMANDS[words[0]][0].partition(":")
    owner = importlib.import_module(module)
    if hasattr(owner, "parse_command"):
        if hasattr(owner, "load"):
            monkeypatch.setattr(owner, "load", opened)  # each run once

        def parse_and_stop(*arguments):
            parse_command(*arguments)
            raise SystemExit

        monkeypatch.setattr(owner, "parse_command", parse_and_stop)
    else:
        command = getattr(owner, function)
        monkeypatch.setattr(owner, function, functools.wraps(command)(lambda *_, **__: None))
    run([word.replace("$i", "0") for word in words])


@pytest.mark.parametrize("text", CALLS)
def test_a_documented_command_line_is_one_that_its_command_takes(text, made, monkeypatch):
    monkeypatch.chdir(made)
    read_by_its_parser(shortened(CALLS[text]), monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "gfl-jax train gfl_r18_fpn_bccd --data.rooot PHOTOS",
        "gfl-jax export RUN -o DIR --format safetensors|tflite",
        "gfl-jax eval RUN [--limt 500]",
        "gfl-jax convert gfl_r50.pth",
        "gfl-jax trian",
        "python train.py configs/gfl_r50_fpn_2x_coco.py",
    ],
)
def test_a_mistake_in_a_documented_command_line_is_found(line, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    with pytest.raises((AssertionError, KeyError)):
        for words in expanded(*calls(line)):
            read_by_its_parser(words, monkeypatch)


def parts_that_are_not_ours():
    """What there is between the calls of this package, at the least."""
    parts = [part for line in SHELL for part in re.split(r" && (?!scontrol)", line)]
    return [part for part in parts if not calls(part)]


def test_every_other_line_is_accounted_for():
    known = (*NOT_OURS, "source ", "pytest ")
    assert [part for part in parts_that_are_not_ours() if not part.startswith(known)] == []


def test_what_is_not_run_is_still_in_the_documentation():
    texts = "".join(f"{text} \n" for text in CALLS)
    assert [part for part in READ_ONLY if part not in texts] == []
    lines_and_blocks = [*SHELL, *parts_that_are_not_ours(), *(b.text.lstrip() for b in BLOCKS)]
    listed = (*NOT_OURS, *NO_COMMANDS)
    gone = [p for p in listed if not any(text.startswith(p) for text in lines_and_blocks)]
    assert gone == []


def pages_say(pattern):
    return {found for page in PAGES for found in re.findall(pattern, page.read_text())}


def test_flags_in_sentences_exist():
    faulty = {
        (page.name, text, flag)
        for page in PAGES
        for text in inline(page.read_text())
        if not re.match(r"python tests/|python benchmarks/|docker|pytest", text)
        for flag in unknown_flags(text)
        if flag not in OTHERS_FLAGS
    }
    assert faulty == set()
    assert unknown_flags("--train.epoch 3") == ["--train.epoch"]
    assert unknown_flags("gfl-jax eval RUN --topology x") == ["--topology"]
    assert unknown_flags("python train.py --data.no-keep-ratio --no-such") == ["--such"]


def test_commands_and_programs_in_sentences_exist():
    assert pages_say(r"`gfl-jax ([a-z]+)") <= set(COMMANDS)
    for program, flag in pages_say(r"`python (tests/\w+\.py)(?: (--\w+))?"):
        assert (flag or "") in (ROOT / program).read_text()
    for config in pages_say(r"\b(configs/\w+\.py|examples/\w+\.\w+|tests/[\w/]+\.py)"):
        assert (ROOT / config).is_file(), config


def test_extras_that_are_installed_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {
        extra for text in pages_say(r"(?:gfl-jax|\.)\[([\w,-]+)\]") for extra in text.split(",")
    }
    assert named and named <= set(extras)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in contents, page.name


@pytest.mark.parametrize(
    "page", [p for p in PAGES[1:] if p.name not in ABOUT], ids=lambda p: p.name
)
def test_a_page_opens_with_what_it_is_for_and_a_command(page):
    title, opening, *_ = re.split(r"\n\n+", page.read_text())
    assert title.startswith("# ")
    assert opening[0].isupper() and len(opening) > 60
    start = "\n".join(page.read_text().splitlines()[:16])
    assert any(calls(line) for block in blocks(page.name, start) for line in lines(block))


def test_the_table_of_runs_has_the_numbers_of_the_readme_and_the_tables():
    sources = (ROOT / "README.md").read_text() + (ROOT / "docs" / "tables.md").read_text()
    numbers = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", (ROOT / "docs" / "runs.md").read_text())
    assert len(numbers) > 20
    assert [number for number in numbers if number not in sources] == []


def test_what_is_cited_is_what_the_citation_file_says():
    readme = (ROOT / "README.md").read_text()
    paper, software = re.findall(r"^@[\s\S]*?^}", readme, re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    assert set(re.findall(r"family-names: (\w+)", citation)) == set(re.findall(r"(\w+), \w", paper))
    for field in ("title", "collection-title", "year"):
        for value in re.findall(rf"^    {field}: \"?(.+?)\"?$", citation, re.M):
            assert value in paper
    for field in ("title", "version", "license"):
        assert re.search(rf"^{field}: \"?(.+?)\"?$", citation, re.M)[1] in software.replace(
            "\\", ""
        )


def test_all_flags_of_a_command_are_known():
    assert {"--detector.assigner.center-radius", "--data.root", "--workdir"} <= flags_of_command(
        "train"
    )
    assert flags_of_command("convert") == {"--src", "--dst", "--config", "--annotations", "--ema"}
