"""The script that measures everything on one GPU runs to its end, here on small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/one_gpu.py"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("GPU_TESTS_ON") == "pretend", reason="the script registers no device")
def test_every_part_gives_figures(tmp_path: Path) -> None:
    device, out = os.environ.get("GPU_TESTS_ON", "cuda"), tmp_path / "gpu.json"
    sizes = ["--scale", "64", "--samples", "8", "--steps", "1", "--rounds", "1"]
    subprocess.run([sys.executable, SCRIPT, "--device", device, *sizes, "--json", out], check=True, timeout=300)
    rows = json.loads(out.read_text())
    for part in ("scoring", "masks", "selection", "sparse24", "perp", "alps"):
        assert isinstance(rows[part], dict), rows[part]
    assert all(rows["scoring"][score]["ours"]["ratio"] > 0 for score in ("wanda", "kfac", "gblm"))
