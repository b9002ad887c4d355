"""SparsityMonitor in several processes: every weight counted once, written by one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch, results

from lightning_prune.history import HISTORY_FILE, read_history

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_counts_are_those_of_the_whole_model(tmp_path: Path) -> None:
    settings = {"score": "wanda", "monitor": True}
    names = ("ddp", "fsdp2", "tp")
    done = launch(2, *((tmp_path / name, name, settings) for name in names))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        state = results(tmp_path / name, 2)[0]
        history = read_history(tmp_path / name / HISTORY_FILE)
        assert [entry["step"] for entry in history.steps] == [0, 2, 4], name
        expected = {
            key.removeprefix("weight.").removesuffix(".weight"): (int((value == 0).sum()), value.numel())
            for key, value in state.items()
            if key.startswith("weight.") and "_proj" in key
        }
        assert {n: (e["zeros"], e["numel"]) for n, e in history.layers.items()} == expected, name
        assert sum(e["zeros"] for e in history.layers.values()) > 0
        assert history.run["processes"] == 2
        # Mean scores are those of whole layers: under FSDP2 and tensor parallelism as under DDP, to rounding.
        saliency = history.steps[0]["saliency"]
        assert len(saliency) == 14
        if name != "ddp":
            first = read_history(tmp_path / "ddp" / HISTORY_FILE).steps[0]["saliency"]
            assert saliency == pytest.approx(first, rel=1e-4)
