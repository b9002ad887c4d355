"""What pruning block by block is said to need is what it holds."""

from __future__ import annotations

import pytest
import torch
from tiny import make_llama, make_tokens
from torch import nn

from lightning_prune import prune, walk_memory
from lightning_prune.pruning import calibration


def llama_70b() -> nn.Module:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        return make_llama(num_hidden_layers=80, vocab_size=32000, **sizes).to(torch.bfloat16)


def test_a_block_of_llama_70b():
    memory = walk_memory(llama_70b(), "exact", num_samples=64, length=2048, batch_size=1)
    # q and o 8192 x 8192, k and v 1024 x 8192, three of 28672 x 8192, two norms.
    assert memory.weights == 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)
    assert memory.hessians == 4 * (6 * 8192**2 + 28672**2)
    assert memory.samples == 2 * 64 * 2048 * 8192
    assert memory.total < 32 * 2**30
    assert str(memory).startswith(f"{memory.total / 2**30:.2f} GiB (weights 1.59,")
    assert walk_memory(llama_70b(), num_samples=64).total < 10 * 2**30


def test_what_a_walk_holds(monkeypatch):
    model, seen = make_llama(), []
    finish = calibration._finish

    def counted(taps, *rest, **more):
        sums = [tensor for tap in taps.all for tensor in tap.accumulator.sums.values() if tensor.dim() == 2]
        seen.append(sum(t.numel() * t.element_size() for t in sums))
        return finish(taps, *rest, **more)

    monkeypatch.setattr(calibration, "_finish", counted)
    prune(model, [make_tokens(4, 8)], "sparsegpt", sequential=True, num_samples=4)
    memory = walk_memory(model, "sparsegpt", num_samples=4, length=8, batch_size=4)
    assert set(seen) == {memory.hessians}
    assert memory.weights == sum(p.numel() * 4 for p in model.model.layers[0].parameters())


def test_refused():
    with pytest.raises(ValueError, match="update='best'"):
        walk_memory(make_llama(), "best")
    with pytest.raises(ValueError, match="no decoder blocks"):
        walk_memory(nn.Linear(2, 2))
