"""Measures the house: how much has to be opened, what is too long, what is imported upwards.

    python tests/house.py

Follows the imports of the package and prints the files between disk and AP for GFL with their
lines, files that are too long, imports from a lower room into a higher one, and import cycles.
`test_house.py` holds the numbers to their limits.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

ROOMS = {
    "errors": ["gfl_jax.errors", "gfl_jax.paths"],
    "geometry and losses": [
        "gfl_jax.boxes",
        "gfl_jax.priors",
        "gfl_jax.scores",
        "gfl_jax.assign",
        "gfl_jax.losses",
    ],
    "devices": ["gfl_jax.distributed", "gfl_jax.hosts"],
    "data": ["gfl_jax.data"],
    "drawing": ["gfl_jax.drawing"],
    "models": ["gfl_jax.models"],
    "detectors": ["gfl_jax.detectors"],
    "coco_eval": ["gfl_jax.coco_eval"],
    "training": ["gfl_jax.training"],
    "experiments": ["gfl_jax.config", "gfl_jax.systems", "gfl_jax.formats"],
    "interop": ["gfl_jax.interop"],
    "runs": ["gfl_jax.run", "gfl_jax.predict", "gfl_jax.results", "gfl_jax.interop.initial"],
    "pictures": ["gfl_jax.visualize"],
    "command line": ["gfl_jax.cli", "gfl_jax.terminal"],
    "interop programs": ["gfl_jax.interop.convert", "gfl_jax.interop.crosscheck"],
    "tools": ["gfl_jax.tools"],
    "front door": [
        "gfl_jax",
        "gfl_jax.__main__",
        "gfl_jax.train",
        "gfl_jax.evaluate",
        "train",
        "eval",
        "configs",
    ],
}
"""Bottom to top: a room imports from those above it in this list and from itself, never from below
it. The longest prefix of a module's name says where it stands."""

STARTS = ("gfl_jax.train", "gfl_jax.evaluate", "configs.gfl_r50_fpn_1x_coco")

NOT_OPENED = {
    "gfl_jax.cli": "config files and flags",
    "gfl_jax.errors": "the class of errors that a user can fix",
    "gfl_jax.paths": "files local or in a bucket",
    "gfl_jax.data.cache": "preparing: raw data sets, found again at the next start",
    "gfl_jax.data.classes": "the error of classes that differ",
    "gfl_jax.data.coco_format": "preparing: what an annotation file says and whether it is right",
    "gfl_jax.data.folders": "preparing: folders that are complete or absent, locks",
    "gfl_jax.data.manifest": "preparing: whether a prepared folder is whole",
    "gfl_jax.data.prepare": "preparing: written once, read by gfl_jax.data.records",
    "gfl_jax.data.tfds_source": "another data set: prepared by tfds",
    "gfl_jax.data.shapes": "another data set: synthetic images",
    "gfl_jax.data.sixteen_bits": "preparing: images of 16 bits",
    "gfl_jax.data.suspicions": "what looks wrong with a data set",
    "gfl_jax.data.ssd_augment": "SSD's augmentation",
    "gfl_jax.data.workers": "signals and deaths of worker processes",
    "gfl_jax.detectors.custom": "losses from a user's file",
    "gfl_jax.detectors.dirac": "the boxes of the other detectors",
    "gfl_jax.detectors.sides": "what the distribution of a side says, to draw and measure it",
    "gfl_jax.detectors.with_sides": "the same, of detections",
    "gfl_jax.drawing": "boxes on pictures",
    "gfl_jax.formats": "what earlier versions stored",
    "gfl_jax.interop": "weights of PyTorch files",
    "gfl_jax.models.conv_grad": "a faster gradient of convolutions on CPUs",
    "gfl_jax.models.ssd": "SSD's network",
    "gfl_jax.predict": "detections on images of one's own",
    "gfl_jax.results": "detections on images of one's own",
    "gfl_jax.systems": "the other detectors",
    "gfl_jax.terminal": "errors and signals of commands",
    "gfl_jax.training.instruments": "goodput, profiles, kept programs",
    "gfl_jax.training.loggers": "curves and pictures on other people's services",
    "gfl_jax.training.lock": "one run at a time in a work directory",
    "gfl_jax.training.pictures": "curves and pictures on other people's services",
    "gfl_jax.training.provenance": "what a run is made with",
    "gfl_jax.training.start": "what is checked and said before the first step",
    "gfl_jax.visualize": "pictures",
}
"""Imported, but not on GFL's way from disk to AP; each with the reason."""

FILES_ON_THE_PATH = 20
LINES_ON_THE_PATH = 3000
LINES_OF_A_FILE_ON_THE_PATH = 250
LINES_OF_A_FILE = 400


@functools.cache
def modules() -> dict[str, Path]:
    """Every file of the product by its module's name."""
    files = [ROOT / "train.py", ROOT / "eval.py", ROOT / "configs/gfl_r50_fpn_1x_coco.py"]
    files += sorted((ROOT / "gfl_jax").rglob("*.py"))
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of the product that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & set(modules())
            found |= submodules
            if len(submodules) < len(names):
                found.add(node.module)
    return frozenset(found & set(modules()) - {module})


def lines_of(module: str) -> int:
    """Lines of a module's file."""
    return len(modules()[module].read_text().splitlines())


def not_opened(module: str) -> bool:
    """Whether a module is in NOT_OPENED, itself or with the package that it belongs to."""
    return any(module == name or module.startswith(f"{name}.") for name in NOT_OPENED)


def path() -> dict[str, int]:
    """What has to be opened to follow GFL from disk to loss to AP, with its lines."""
    opened: dict[str, int] = {}
    waiting = list(STARTS)
    while waiting:
        module = waiting.pop()
        if module in opened or not_opened(module):
            continue
        opened[module] = lines_of(module)
        waiting += imports_of(module)
    # A package's file that holds a docstring alone is not opened.
    return {name: lines for name, lines in sorted(opened.items()) if lines > 1}


@functools.cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """The functions, classes and constants of a module by their names."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(modules()[module].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)]
            found |= dict.fromkeys(names, node)
    return found


@functools.cache
def imported_names(module: str) -> dict[str, tuple[str, str]]:
    """What each name that a module imports stands for: (module, name in it)."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(ast.parse(modules()[module].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def uses(node: ast.AST) -> Iterator[str]:
    """Names in a definition; not those in annotations, which lists of alternatives stand in."""
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from uses(child)
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield f"{node.value.id}.{node.attr}"


def used() -> dict[str, int]:
    """Lines of the definitions on the path that GFL uses, by module: classes count as wholes.

    What no text leads to from the two programs and the config is left out: the other assigners,
    boxes, qualities and losses.
    """
    opened, reached = path(), dict[tuple[str, str], int]()
    waiting = [(start, name) for start in STARTS for name in definitions(start)]
    while waiting:
        module, name = waiting.pop()
        if module not in opened or (module, name) in reached:
            continue
        node = definitions(module).get(name)
        if node is None:
            waiting += [imported_names(module)[name]] if name in imported_names(module) else []
            continue
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        reached[module, name] = (node.end_lineno or first) - first + 1
        for text in uses(node):
            owner, _, attribute = text.partition(".")
            package, inner = imported_names(module).get(owner, ("", ""))
            if attribute and f"{package}.{inner}" in modules():
                waiting.append((f"{package}.{inner}", attribute))
            else:
                waiting += [(module, owner), imported_names(module).get(owner, ("", ""))]
    lines: dict[str, int] = {}
    for (module, _), count in reached.items():
        lines[module] = lines.get(module, 0) + count
    return lines


def code_of(module: str) -> int:
    """Lines of a module that hold code: no docstrings, comments or empty lines."""
    text = modules()[module].read_text()
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in docstrings
        for number, line in lines
    )


def room_of(module: str) -> int:
    """The floor that a module stands on, 0 the lowest."""
    places = {prefix: floor for floor, prefixes in enumerate(ROOMS.values()) for prefix in prefixes}
    prefixes = [p for p in places if module == p or module.startswith(f"{p}.")]
    if not prefixes or (module != "gfl_jax" and max(prefixes, key=len) == "gfl_jax"):
        raise ValueError(f"{module} stands in no room: name it in ROOMS")
    return places[max(prefixes, key=len)]


def upward() -> Iterator[str]:
    """Imports from a lower room into a higher one."""
    rooms = list(ROOMS)
    for module in modules():
        for other in sorted(imports_of(module)):
            if room_of(other) > room_of(module):
                names = rooms[room_of(module)], rooms[room_of(other)]
                yield f"{module} ({names[0]}) -> {other} ({names[1]})"


def cycles() -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""

    @functools.cache
    def reached(module: str) -> frozenset[str]:
        seen: set[str] = set()
        waiting = list(imports_of(module))
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += imports_of(other)
        return frozenset(seen)

    groups = {
        tuple(sorted({module} | {o for o in reached(module) if module in reached(o)}))
        for module in modules()
        if module in reached(module)
    }
    return [list(group) for group in sorted(groups)]


def too_long() -> dict[str, int]:
    """Files above their limit: the lower one on the path, the higher one elsewhere."""
    on_path = path()
    limits = {
        module: LINES_OF_A_FILE_ON_THE_PATH if module in on_path else LINES_OF_A_FILE
        for module in modules()
    }
    return {m: lines_of(m) for m, limit in limits.items() if lines_of(m) > limit}


def main() -> None:
    """Prints everything."""
    opened = path()
    for floor, room in enumerate(ROOMS):
        inside = {m: lines for m, lines in opened.items() if room_of(m) == floor}
        if inside:
            print(f"{sum(inside.values()):6d}  {room}")
        for module, lines in inside.items():
            print(f"{lines:12d}  {modules()[module].relative_to(ROOT)}")
    print(
        f"{sum(opened.values()):6d}  lines in {len(opened)} files to open for GFL, from disk to "
        f"loss to AP (goal: {LINES_ON_THE_PATH} in {FILES_ON_THE_PATH})\n"
        f"{sum(used().values()):6d}  of these in definitions that GFL uses\n"
        f"{sum(map(code_of, opened)):6d}  of these code: no docstrings, comments or empty lines\n"
        "\nnot opened:"
    )
    for name, reason in NOT_OPENED.items():
        print(f"  {name}: {reason}")
    total = sum(lines_of(m) for m in modules() if m.startswith("gfl_jax"))
    print(f"\nthe package has {total} lines in {len(list((ROOT / 'gfl_jax').rglob('*.py')))} files")
    for title, found in (
        ("too long", [f"{m}: {lines} lines" for m, lines in too_long().items()]),
        ("imported upwards", list(upward())),
        ("import cycles", [", ".join(group) for group in cycles()]),
    ):
        print(f"\n{title}: {len(found) or 'none'}", *found, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
