"""The paper's tables: trains and evaluates each row, and writes it beside the paper's numbers.

    gfl-jax tables 1a --data COCO --seeds 3
    gfl-jax tables 1a --rows 'atss_*' --budget small

The rows are those of configs/table_1a.py and so on. A row that occurs in several tables is trained
once; finished runs are not repeated and interrupted ones are resumed. Writes
table_1a.md, a plot table_1a.png and all numbers table_1a.json, and so on, to --out.
"""

import dataclasses
import fnmatch
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from gfl_jax.cli import CONFIGS, load_experiment, load_rows
from gfl_jax.config import Data, Experiment, Row, Train, from_dict, to_dict
from gfl_jax.data.manifest import MANIFEST
from gfl_jax.data.sources import Prepared, Shapes, open_split
from gfl_jax.distributed import parallel
from gfl_jax.errors import InputError, MissingExtraError, MissingFileError, UsageError
from gfl_jax.interop.initial import initial_weights
from gfl_jax.models.network import Network
from gfl_jax.paths import PathLike, as_path, write
from gfl_jax.run import describe, load
from gfl_jax.systems import variant
from gfl_jax.training.evaluator import Evaluator
from gfl_jax.training.loop import fit
from gfl_jax.training.metrics import read_metrics
from gfl_jax.visualize import new_figure, save_figure

TABLES = ("1a", "1b", "1c", "2a", "2b", "2c", "3")
COLUMNS = ("AP", "AP50", "AP75", "APS", "APM", "APL")
WITH_SPEED = ("3",)
"""Tables for which the paper states images/s."""
PAPER_SPEED = 19.4
SMALL_STEPS, SMALL_BATCH, SMALL_PIXELS = 1500, 8, 128 * 128


def small(experiment: Experiment, num_images: int) -> Experiment:
    """The same choices at a size that a laptop trains in a few minutes.

    A ResNet-18 of half width (SSD: VGG of a quarter) from random weights, pyramid and head 64 wide
    with two convolutions per tower, and as many steps of eight images as take the time of 1500 at
    128 x 128 pixels. Towers have GroupNorm, even those of RetinaNet and FoveaBox: without it they
    learn nothing from random weights in this time.

    Args:
        experiment: a row with the data to use.
        num_images: training images per epoch.
    """
    width, height = experiment.data.scale
    steps = SMALL_STEPS * SMALL_PIXELS / (width * height)
    epochs = max(round(steps * SMALL_BATCH / num_images / experiment.data.repeats), 1)
    train = Train(
        batch_size=SMALL_BATCH,
        lr=0.08 * experiment.train.lr / Train().lr,
        weight_decay=experiment.train.weight_decay,
        bias_lr=experiment.train.bias_lr,
        bias_decay=experiment.train.bias_decay,
        epochs=epochs,
        milestones=(max(round(0.75 * epochs), 1),),
        warmup_steps=100,
        warmup_factor=0.01,
        clip_norm=35.0,
        eval_every=0,
        seed=experiment.train.seed,
    )
    model, detector = experiment.model.small(min(width, height))
    experiment = dataclasses.replace(experiment, model=model, train=train)
    return variant(experiment, detector=detector)


def _moved(source: Any, root: str) -> Any:
    """The same data source in another folder."""
    return dataclasses.replace(source, root=root)


def data_of(source: str, budget: str, own: Data) -> Data:
    """The data to train a row on: from `source`, but scaled and augmented as the row says.

    Args:
        source: 'shapes'; a prepared folder; one in COCO 2017's layout; or a config file that names
            the data, with the folder of its root after a colon: CONFIG.py:FOLDER.
        budget: with 'small', images fit 128 x 128 pixels (shapes and SSD) or 192 x 144.
        own: the data of the row's config.

    Raises:
        MissingFileError: there is no such folder or file.
    """
    if source == "shapes":
        data = Data(source=Shapes(), workers=0, cache_megabytes=192)
    elif ".py" in source:
        file, _, root = source.partition(".py:")
        data = load_experiment(f"{file}.py" if root else source).data
        if root:
            data = dataclasses.replace(data, source=_moved(data.source, root))
    elif (as_path(source) / MANIFEST).exists():
        data = dataclasses.replace(own, source=Prepared(source))
    elif Path(source).expanduser().is_dir():
        data = dataclasses.replace(own, source=_moved(own.source, source))
    else:
        raise MissingFileError(
            f"--data is {source!r}: give 'shapes', a prepared folder, one with annotations/, "
            "train2017/ and val2017/, or a config file that names the data"
        )
    data = dataclasses.replace(
        data,
        scale=own.scale,
        multi_scale=own.multi_scale,
        canvases=own.canvases,
        flip=own.flip,
        keep_ratio=own.keep_ratio,
        augmentation=own.augmentation,
        repeats=own.repeats,
    )
    if budget == "full":
        return data
    square = source == "shapes" or not own.keep_ratio
    return dataclasses.replace(
        data,
        scale=(128, 128) if square else (192, 144),
        multi_scale=None,
        canvases=(),
        repeats=1,
        workers=0,
        cache_megabytes=256,
    )


def jobs_of(table: str, configs: Path = CONFIGS) -> dict[str, tuple[Row, str]]:
    """The rows of a table, each with the name it is trained under.

    That is the first table and row with the same experiment, in the order of the tables.

    Raises:
        InputError: there is no such table.
    """
    if table not in TABLES:
        raise InputError(f"there is no table {table!r}; there are {', '.join(TABLES)}")
    first: dict[Experiment, str] = {}
    for name in TABLES[: TABLES.index(table) + 1]:
        rows = load_rows(configs / f"table_{name}.py")
        for key, row in rows.items():
            first.setdefault(row.experiment, f"{name}_{key}")
    return {key: (row, first[row.experiment]) for key, row in rows.items()}


def listing(table: str, chosen: dict[str, tuple[Row, str]], out: PathLike) -> str:
    """The rows of a table, what the paper states, and which seeds are finished."""
    lines = [f"table {table}"]
    for key, (row, name) in chosen.items():
        seeds = sorted(
            file.parent.name[4:] for file in (as_path(out) / name).glob("seed*/result.json")
        )
        paper = " ".join(f"{value:.1f}" for value in row.paper) or "no numbers"
        done = f"finished: seed {', '.join(seeds)}" if seeds else "not trained"
        lines.append(f"  {key:<24} {row.title:<32} paper {paper:<30} {done}")
    return "\n".join(lines)


def train_row(experiment: Experiment, workdir: PathLike) -> dict[str, float]:
    """Trains and evaluates an experiment in `workdir`, resuming it if it was interrupted.

    Returns:
        pycocotools' numbers from the last evaluation, and the minutes since this start. They are
        stored in result.json: a finished experiment is not run again.

    Raises:
        InputError: the folder holds another experiment.
    """
    file = as_path(workdir) / "result.json"
    as_json = to_dict(experiment)
    if file.exists():
        stored = json.loads(file.read_text())
        if from_dict(Experiment, stored["experiment"]) != experiment:
            raise InputError(f"{workdir} holds another experiment; choose another --out")
        return stored["metrics"]
    train_split = open_split(experiment.data, "train")
    val_split = open_split(experiment.data, "val")
    predicts = experiment.detector.predicts(len(train_split.category_ids))
    network = Network(experiment.model, predicts)
    devices = parallel(experiment.train.mapping)
    started = time.perf_counter()
    fit(
        network,
        experiment.detector,
        experiment.data,
        experiment.train,
        train_split=train_split,
        val_split=val_split,
        devices=devices,
        workdir=workdir,
        initial=lambda: initial_weights(experiment, network, train_split.category_names),
        about=describe(experiment, val_split.category_ids, val_split.category_names),
    )
    last = [entry for entry in read_metrics(workdir) if entry["kind"] == "val"][-1]
    metrics = {name: last[name] for name in COLUMNS}
    metrics["minutes"] = (time.perf_counter() - started) / 60
    write(file, json.dumps({"metrics": metrics, "experiment": as_json}))
    jax.clear_caches()
    return metrics


def speeds(workdirs: list[PathLike], rounds: int = 5) -> list[float]:
    """Images/s of finished runs with post-processing, measured in turn on their first batches."""
    runs = []
    for workdir in workdirs:
        run = load(workdir)
        detector, data, train = run.experiment.detector, run.experiment.data, run.experiment.train
        devices, split = parallel(train.mapping), open_split(data, "val")
        evaluator = Evaluator(run.network, detector, data, devices, split, train.eval_batch)
        runs.append((evaluator, devices.replicate(run.variables)))
    measured = [
        [evaluator.images_per_second(variables, repeats=3)[0] for evaluator, variables in runs]
        for _ in range(rounds)
    ]
    return np.median(measured, axis=0).tolist()


def markdown(rows: list[Row], results: list[list[dict[str, float]]], speed: list[float]) -> str:
    """The table: each row's mean and deviation over seeds, in percent, beside the paper's."""
    head = [
        "row",
        *COLUMNS,
        "seeds",
        *(["images/s"] if speed else []),
        *(f"paper {m}" for m in COLUMNS),
    ]
    if speed:
        head.append("paper images/s")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for i, (row, runs) in enumerate(zip(rows, results, strict=True)):
        cells = [row.title]
        for metric in COLUMNS:
            values = [100 * run[metric] for run in runs if run[metric] >= 0]  # -1: no such objects
            deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{deviation}" if values else "")
        cells.append(str(len(runs)))
        cells += [f"{speed[i]:.1f}"] if speed else []
        cells += [f"{value:.1f}" for value in row.paper] + [""] * (len(COLUMNS) - len(row.paper))
        cells += [f"{PAPER_SPEED:.1f}"] if speed else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(
    file: PathLike, title: str, rows: list[Row], results: list[list[dict[str, float]]]
) -> None:
    """Writes a PNG of AP, AP50 and AP75: ours above, with a dot per seed, the paper's below."""
    figure = new_figure(13, 2.2 + 0.5 * len(rows))
    axes = figure.subplots(2, 3, sharey=True)
    names = [row.title for row in rows]
    y = np.arange(len(rows))
    for column, metric in enumerate(COLUMNS[:3]):
        ours, paper = axes[:, column]
        values = [[100 * run[metric] for run in runs] for runs in results]
        ours.hlines(y, [min(v) for v in values], [max(v) for v in values], color="0.6")
        for row, seeds in enumerate(values):
            ours.plot(seeds, [row] * len(seeds), ".", color="C0", alpha=0.6)
        ours.plot([np.mean(v) for v in values], y, "|", color="C0", markersize=16)
        ours.set_title(f"{metric}, here", fontsize=10)
        stated = [row.paper[column] if column < len(row.paper) else np.nan for row in rows]
        paper.plot(stated, y, "|", color="C1", markersize=16)
        paper.set_title(f"{metric}, paper (COCO)", fontsize=10)
        for ax in (ours, paper):
            ax.set_yticks(y, names)
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(title)
    save_figure(figure, file)


def main(
    tables: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TABLE...")],
    data: str = "",
    seeds: int = 1,
    budget: Literal["full", "small"] = "full",
    rows: str = "*",
    out: str = "runs/tables",
    configs: Path = CONFIGS,
    only_list: Annotated[bool, tyro.conf.arg(name="list")] = False,
) -> None:
    """Trains the rows of tables and writes them beside the paper's numbers.

    Args:
        tables: 1a, 1b, 1c, 2a, 2b, 2c or 3; several tables are trained seed by seed.
        data: a folder in COCO 2017's layout; a prepared folder; 'shapes' (the default of the small
            budget); or a config file that names the data, with the folder of its root after a
            colon: configs/gfl_r18_fpn_bccd.py:BCCD.
        seeds: runs per row, with seeds 0, 1, ...
        budget: 'full': as the config says; 'small': a few minutes per row on two cores.
        rows: which rows, a pattern such as 'atss_*'.
        out: folder of all runs and tables, local or `gs://...`.
        configs: folder of table_1a.py and so on.
        only_list: print the rows and what is finished in `out`, and train nothing.

    Raises:
        UsageError: no table or no data is named.
        InputError: there is no such table or row, or `out` holds other experiments.
    """
    if not tables:
        raise UsageError(f"name at least one table: {', '.join(TABLES)}")
    every = {table: jobs_of(table, configs) for table in tables}
    if not data and budget == "full" and not only_list:
        raise UsageError("the full budget needs --data FOLDER (COCO 2017); or use --budget small")
    data, folder = data or "shapes", as_path(out)
    chosen: dict[str, dict[str, tuple[Row, str]]] = {}
    for table, jobs in every.items():
        chosen[table] = {k: v for k, v in jobs.items() if fnmatch.fnmatch(k, rows)}
        if not chosen[table]:
            raise InputError(f"table {table} has no row {rows!r}; it has {', '.join(jobs)}")
    if only_list:
        print("\n\n".join(listing(table, jobs, folder) for table, jobs in chosen.items()))
        return
    work = [
        (seed, name, row)
        for seed in range(seeds)
        for name, row in {n: r for t in chosen.values() for r, n in t.values()}.items()
    ]
    results: dict[str, list[dict[str, float]]] = {}
    for i, (seed, name, row) in enumerate(work):
        print(f"\n[{i + 1} of {len(work)}] {name}: {row.title}, seed {seed}", flush=True)
        experiment = dataclasses.replace(
            row.experiment,
            data=data_of(data, budget, row.experiment.data),
            train=dataclasses.replace(row.experiment.train, seed=seed),
        )
        if budget == "small":
            train_split = open_split(experiment.data, "train")
            experiment = small(experiment, int((train_split.num_boxes > 0).sum()))
        metrics = train_row(experiment, folder / name / f"seed{seed}")
        print(", ".join(f"{key} {value:.3f}" for key, value in metrics.items()), flush=True)
        results.setdefault(name, []).append(metrics)

    for table, jobs in chosen.items():
        runs = [results[name] for _, name in jobs.values()]
        values = [row for row, _ in jobs.values()]
        speed = []
        if table in WITH_SPEED:
            speed = speeds([folder / name / "seed0" for _, name in jobs.values()])
        text = markdown(values, runs, speed)
        file = folder / f"table_{table}"
        write(file.with_suffix(".md"), text)
        write(file.with_suffix(".json"), json.dumps(dict(zip(jobs, runs, strict=True))))
        print(f"\ntable {table}\n\n{text}\n{file}.md, .json")
        try:
            plot(file.with_suffix(".png"), f"table {table}: {budget} budget, {data}", values, runs)
            print(f"{file}.png")
        except MissingExtraError as error:
            print(f"not drawn: {error}")


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax tables, or python -m gfl_jax tables")
