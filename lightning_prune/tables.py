"""Results as tables: one description for the terminal and for Markdown; files that are replaced whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.markup import escape

from lightning_prune.sources import expanded


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Headings; the first column is aligned to the left, the others to the right.
        rows: Cells, as many as there are columns.
        notes: Sentences below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> rich.table.Table:
        """For a terminal."""
        table = rich.table.Table(
            title=escape(self.title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
        )
        for index, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        r"""For a document, with a heading of the second level.

        Example:
            >>> print(Table("Sizes", ("file", "MiB"), [("a|b", "3")], ["Two files."]).markdown())
            ## Sizes
            <BLANKLINE>
            | file | MiB |
            |:--|--:|
            | a\|b | 3 |
            <BLANKLINE>
            Two files.
        """
        lines = [f"## {self.title}", "", _line(self.columns), "|:--|" + "--:|" * (len(self.columns) - 1)]
        lines += map(_line, self.rows)
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def check_outputs(outputs: Sequence[str]) -> list[Path]:
    """The files to write results to, checked before work of minutes or hours begins.

    Raises:
        ValueError: a name that ends neither in .json nor in .md, a folder, or a folder that does not exist.
    """
    paths = [expanded(output, "output") for output in outputs]
    for path in paths:
        if path.suffix not in (".json", ".md"):
            raise ValueError(f"output={str(path)!r} must end in .json or .md")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"output={str(path)!r} is a folder, or in a folder that does not exist; make it first")
    return paths


def write_results(outputs: Sequence[Path], results: Mapping[str, Any], title: str, tables: Sequence[Table]) -> None:
    """Write results as JSON and as Markdown, as the names of the files say.

    Raises:
        OSError: a file cannot be written; an old one is as it was then.
    """
    for path in outputs:
        if path.suffix == ".json":
            text = json.dumps(results, indent=2)
        else:
            text = "\n\n".join([f"# {title}", *(table.markdown() for table in tables)])
        replace_text(path, text + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
