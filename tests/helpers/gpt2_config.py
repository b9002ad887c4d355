"""The configuration of a small GPT-2."""

from __future__ import annotations

GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
