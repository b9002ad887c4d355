"""Imports point one way, hold no circle, and the heavy libraries stay where the layout says."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_prune"
# From the ground up: a file may import from its own box and from those before it.
ORDER = (
    "errors", "naming", "progress", "schedules", "sharding", "ranks", "safety", "history", "results",
    "pruning", "perp", "structure", "checkpoints", "evaluation", "report", "text", "callbacks",
    "quickstart", "__init__", "cli",
)  # fmt: skip
ONLY = {"lightning": {"callbacks", "text", "quickstart", "cli"}, "peft": {"perp"}}
FILES = sorted(PACKAGE.rglob("*.py"))
# Words that say how a file came about, not what it holds.
SPLITS = ("_parts", "_checks", "_results", "_view", "_utils", "_helpers", "_misc")


def name_of(path: Path) -> str:
    """Dotted name below the package; of a folder that of its ``__init__``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def box(name: str) -> str:
    return name.partition(".")[0]


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Everything in a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions and for types alone."""
    nodes = nodes_of(path)
    found = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = {name_of(path): path for path in FILES}


def inside(module: str) -> str | None:
    """The module of the package that an imported name belongs to, or None for other packages."""
    if module.partition(".")[0] != PACKAGE.name:
        return None
    parts = module.split(".")[1:]
    for end in range(len(parts), -1, -1):
        for name in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if name in MODULES:
                return name
    raise AssertionError(f"{module} is nowhere in the package")


@cache
def arrows() -> dict[str, set[str]]:
    """Of each module those that it imports."""
    return {n: {a for m in imports(path) if (a := inside(m)) not in (None, n)} for n, path in MODULES.items()}


def test_every_box_has_its_place():
    assert {box(name) for name in MODULES} == set(ORDER)
    assert len(ORDER) <= 20


def test_imports_point_down():
    # The root names everything, and nobody goes through it: names are imported from where they are.
    order = {b: place for place, b in enumerate(ORDER)}
    assert not [(n, o) for n, others in arrows().items() for o in others if order[box(o)] > order[box(n)]]


def test_no_circle():
    # The folders' own files name what is in them, for users.
    graph = {
        name: {other for other in others if not other.endswith("__init__")}
        for name, others in arrows().items()
        if not name.endswith("__init__")
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_heavy_libraries_stay_in_their_boxes():
    for name, path in MODULES.items():
        for module in imports(path):
            top = module.partition(".")[0]
            assert box(name) in ONLY.get(top, {box(name)}), f"{name} imports {module}"


def test_at_most_nine_floors():
    """A box stands one floor above the highest that it imports."""
    below = {b: {box(o) for n in MODULES if box(n) == b for o in arrows()[n]} - {b} for b in ORDER}
    floors: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        floors[name] = 1 + max((floors[other] for other in below[name]), default=0)
    assert max(floors.values()) <= 9, floors


def test_no_file_is_named_after_a_split():
    assert not [name for name in MODULES if name.endswith(SPLITS)]


# Who asks whether a tensor or a model is sharded, beside `sharding.py`, whose functions take both.
ASKING = {
    "callbacks.checks", "callbacks.traces", "perp.layers", "pruning.masks", "pruning.pipeline", "text.module",
}  # fmt: skip
QUESTIONS = {"is_sharded", "has_sharded_parameters", "DTensor", "FSDPModule"}


def test_sharding_is_asked_for_in_few_files():
    asking = set()
    for name, path in MODULES.items():
        for node in nodes_of(path):
            # What is None without shards: the mesh of a layout, the processes of a group.
            parts = list(ast.walk(node)) if isinstance(node, ast.Compare) else []
            compared = any(isinstance(n, ast.Attribute) and n.attr == "mesh" for n in parts) or any(
                isinstance(n, ast.Name) and n.id == "shard_group" for n in parts
            )
            if compared or (isinstance(node, ast.Name) and node.id in QUESTIONS):
                asking.add(name)
    assert asking - {"sharding"} == ASKING
    assert len(ASKING) <= 6


@pytest.mark.slow
def test_scripts_import_what_is_there():
    """Most imports of the benchmarks stand in functions, which no test of theirs runs all of."""
    missing = []
    for path in sorted((PACKAGE.parent / "tests").rglob("*.py")) + sorted((PACKAGE.parent / "recipes").rglob("*.py")):
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
                module = import_module(str(node.module))
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name) and find_spec(f"{node.module}.{name}") is None:
                        missing.append(f"{path.name}: {node.module}.{name}")
    assert not missing
