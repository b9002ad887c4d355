"""`PruningAwarePretraining` in a Trainer: targets, exactness of compaction, what training goes through, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import make_tokens
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_prune import CausalLM, PruningAwarePretraining, WeightPruning

SMALL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.1,
    "tie_word_embeddings": True,
}  # fmt: skip


def make_module(seed: int = 0, **changes: Any) -> CausalLM:
    torch.manual_seed(seed)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "lr_schedule": "constant"}
    return CausalLM(config={**SMALL, **changes.pop("config", {})}, **{**settings, **changes})


def batches(batch_size: int = 4, samples: int = 64) -> DataLoader:
    ids = make_tokens(samples, 8, vocab=64).repeat(1, 2)
    return DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)


def make_trainer(*callbacks: L.Callback, max_steps: int = 12, **settings: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_steps": max_steps, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def fit(callback: PruningAwarePretraining, module: CausalLM | None = None, **settings: Any) -> CausalLM:
    module = module or make_module()
    others = settings.pop("callbacks", [])
    make_trainer(callback, *others, **settings).fit(module, batches())
    return module


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("target", "types"),
    [(0.6, ("attention", "ffn", "stem")), (0.7, ("ffn",)), (14_000, ("ffn", "stem")), (0.5, ("ffn", "layer"))],
)
def test_the_target_is_reached_and_the_model_is_ordinary(target: Any, types: tuple[str, ...], tmp_path: Path) -> None:
    before = count(make_module())
    callback = PruningAwarePretraining(target, types, end=10, compact_every=3, picture=str(tmp_path / "p.png"))
    module = fit(callback)
    wanted = target * before if isinstance(target, float) else target
    assert count(module.model) <= wanted
    assert "layer" in types or count(module.model) > wanted - 2000  # not further below than the last unit
    assert callback.history[-1].parameters == count(module.model)
    assert callback.history[-1].step <= 10
    assert (tmp_path / "p.png").exists()
    ids = make_tokens(2, 9, vocab=64)
    module.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(loaded(ids).logits, module.eval()(ids), rtol=1e-5, atol=1e-5)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_sizes_by_name() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 1}
    module = fit(PruningAwarePretraining(sizes, units_per_pruning=3))
    config = module.model.config
    assert (config.hidden_size, config.intermediate_size) == (24, 40)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)


class Checked(PruningAwarePretraining):
    """Compares the logits before and after each compaction."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.differences: list[float] = []
        self.masked: list[dict[str, int]] = []

    def _compact(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._shrinking.pending:
            ids = make_tokens(3, 11, vocab=64)
            self.masked.append({t: len(p[0]) for t, p in self._shrinking.pending.items()})
            with torch.no_grad():
                before = module.model(ids).logits
                super()._compact(trainer, module)
                self.differences.append(float((module.model(ids).logits - before).abs().max()))


FAMILIES = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_compaction_changes_nothing_in_float64_after_real_steps(family: str) -> None:
    """After training steps with masks, momentum and weight decay: masked units must have stayed exactly zero."""
    module = make_module(config=FAMILIES[family]).double()
    types = ("ffn",) if family == "gpt2" else ("attention", "ffn", "stem")
    callback = Checked(0.6 if family != "gpt2" else 0.8, types, end=10, compact_every=4)
    fit(callback, module, max_steps=11, precision="64-true")
    assert len(callback.differences) == 3
    assert max(callback.differences) < 1e-9
    removed = {t: sum(m.get(t, 0) for m in callback.masked) for t in types}
    assert all(removed.values()) or family != "llama", removed
