"""Killed at any moment, a process leaves the old or the new in its place, whole."""

from __future__ import annotations

import json
import os

import pytest
import torch
from killing import killed_at_every_operation

from lightning_prune.checkpoints.mask_files import load_masks, save_masks
from lightning_prune.history import append_step, begin_history, read_history
from lightning_prune.safety import replace_text

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of POSIX")


@pytest.mark.slow
def test_masks_texts_and_histories(tmp_path):
    masks, text, history = tmp_path / "m.safetensors", tmp_path / "results.json", tmp_path / "h.jsonl"
    old, new = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    save_masks({"w": old}, masks)
    replace_text(text, json.dumps({"version": "old"}))
    begin_history(history, {"seed": 1}, step=0)
    for step in range(3):
        append_step(history, step, {"w": (1, 16, "w")}, {})

    def act() -> None:
        save_masks({"w": new}, masks)
        replace_text(text, json.dumps({"version": "new"}))
        begin_history(history, {"seed": 1}, step=2)

    def check() -> None:
        found = load_masks(masks)["w"]
        assert torch.equal(found, old) or torch.equal(found, new)
        assert json.loads(text.read_text())["version"] in ("old", "new")
        assert len(read_history(history).steps) in (2, 3)

    assert killed_at_every_operation(act, check) > 8
