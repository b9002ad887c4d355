"""Every command in an error message, a docstring, a page or a recipe is one that the command line takes."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lightning_prune.cli import COMMANDS, TRAINER_COMMANDS, parser_of

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_prune"
PAGES = [*(ROOT / "notebooks").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "recipes").iterdir()]
COMMAND = re.compile(r"lightning-prune\s+([a-z]+)\b((?:[^\S\n]|\\\n|[^\s`])*)")


@cache
def texts(source: str) -> list[str]:
    """The texts of a module; what is computed inside an f-string is left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@cache
def commands() -> list[tuple[str, str, list[str]]]:
    """Place, command and options."""
    sources = [(path, text) for path in PACKAGE.rglob("*.py") for text in texts(path.read_text(encoding="utf-8"))]
    sources += [(path, path.read_text(encoding="utf-8")) for path in PAGES if path.suffix in (".md", ".yaml")]
    found = []
    for path, text in sources:
        for match in COMMAND.finditer(text):
            line = re.split(r"&&|;|\)|`", match[2])[0]
            found.append((str(path.relative_to(ROOT)), match[1], re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", line)))
    return found


def options_of(command: str) -> set[str]:
    return {option for action in parser_of(command)._actions for option in action.option_strings}


def test_there_are_hints_to_test():
    found = commands()
    assert len(found) > 20
    assert any(options for _, command, options in found if command == "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_hints_exist(command):
    known = options_of(command)
    wrong = [(place, options) for place, name, options in commands() if name == command and set(options) - known]
    assert not wrong, f"options of {command}: {sorted(known)}"


def test_commands_of_hints_exist():
    known = {*COMMANDS, *TRAINER_COMMANDS, "masks"}  # the last is part of the name of a format
    wrong = [(place, name) for place, name, _ in commands() if name not in known]
    assert not wrong


def test_bare_options_in_messages_exist():
    """Hints such as (--overwrite), which stand without their command."""
    known = {option for command in COMMANDS for option in options_of(command)}
    known |= {
        "--help",
        "--config",
        "--model",
        "--data",
        "--trainer",
        "--ckpt_path",
        "--version",
        "--save_pretrained",
        "--print_config",
    }
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for text in texts(path.read_text(encoding="utf-8")):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
                if option not in known:
                    wrong.append((path.name, option))
    assert not wrong
