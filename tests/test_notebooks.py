"""The notebooks run from top to bottom, shortened, and are committed with what they print."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
from forking import start

from lightning_prune.text.data import EMBEDDED

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
missing = [name for name in ("nbformat", "IPython") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: the extra 'notebooks'")


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def plain(source: str) -> str:
    """The code of a cell without IPython's own lines."""
    return "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))


def test_they_are_there() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_committed(path: Path) -> None:
    import nbformat

    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    written = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"/(?:tmp|home|root|Users)/", written), "a path of the machine it ran on"
    assert path.stat().st_size < 500_000
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= len(cells) // 2
    for cell in cells:
        ast.parse(plain(cell.source))


def run(path: Path, folder: Path) -> None:
    """Run the code of a notebook on the beginning of its text."""
    import matplotlib

    matplotlib.use("Agg")
    text = EMBEDDED["austen"].read_text(encoding="utf-8")[:60_000]
    EMBEDDED["austen"] = folder / "text.txt"
    EMBEDDED["austen"].write_text(text, encoding="utf-8")
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cell for cell in read(path).cells if cell.cell_type == "code"):
        exec(compile(plain(cell.source), f"{path.stem}, cell {number}", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_they_run(path: Path, tmp_path: Path) -> None:
    """In a process of its own: a notebook changes warnings, logging and the style of pictures."""
    environment = os.environ | {"NOTEBOOK_STEPS": "10", "TMPDIR": str(tmp_path)}
    process = start(run, path, tmp_path, environment=environment, log=tmp_path / "log")
    process.join(500)
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert process.exitcode == 0, said[-3000:]
    assert "perplexity" in said
    assert "nan" not in said
