"""Every name of another library that the package uses is there, whichever version is installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
LIBRARIES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "jsonargparse", "safetensors")
# Used where hasattr has found it, or what it came with.
ASKED_FOR = {"transformers.GgufConfig", "torch.backends.mkldnn.matmul"}


@cache
def find(name: str) -> Any:
    """What a dotted name stands for: an attribute of the longest module in it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)  # an AttributeError is what is looked for
        return found
    raise AttributeError(name)


def imported(tree: ast.Module) -> dict[str, str]:
    """What a file calls names of libraries, with their dotted names.

    Left out is what is imported for types alone, and a name that the file gives to something of its own too.
    """
    nodes = list(ast.walk(tree))
    for_types = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in for_types:
            before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                whole = before or alias.asname
                short = alias.asname or (alias.name if before else alias.name.split(".")[0])
                names[short] = before + alias.name if whole else short
    return {s: n for s, n in names.items() if n.split(".")[0] in LIBRARIES and s not in own}


def missing(tree: ast.Module) -> Iterator[str]:
    """Names, and keywords of functions, that the installed versions do not have."""
    names = imported(tree)
    yield from (name for name in names.values() if not is_there(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node, names)) is not None:
            holder = name.rpartition(".")[0]
            if is_there(holder) and isinstance(find(holder), (ModuleType, type)) and not is_there(name):
                yield name
        if isinstance(node, ast.Call) and (name := dotted(node.func, names)) is not None and is_there(name):
            accepted = arguments(name)
            given = {keyword.arg for keyword in node.keywords} - {None}
            yield from (f"{name}({keyword}=)" for keyword in given if accepted is not None and keyword not in accepted)


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """The dotted name of an expression that begins with one of these names."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (before := dotted(node.value, names)) is not None:
        return f"{before}.{node.attr}"
    return None


def is_there(name: str) -> bool:
    """Whether the installed versions have a name."""
    try:
        find(name)
    except AttributeError:
        return name in ASKED_FOR
    return True


def arguments(name: str) -> set[str] | None:
    """Names of what a function can be given; None if that may be anything, or is not said."""
    try:
        parameters = inspect.signature(find(name)).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_of_other_libraries_exist(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that are imported
        assert not set(missing(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import torch.distributed as dist\ndist.gather_everything()", "torch.distributed.gather_everything"),
        ("from torch.distributed import gather_all", "torch.distributed.gather_all"),
        ("import torch\ntorch.nn.Linear(3, outputs=2)", "torch.nn.Linear(outputs=)"),
        ("from torch import nn\nnn.Linear.from_nothing()", "torch.nn.Linear.from_nothing"),
    ],
)
def test_what_is_missing_is_seen(code: str, said: str) -> None:
    assert said in set(missing(ast.parse(code)))
