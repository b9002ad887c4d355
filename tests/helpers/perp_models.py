"""Small pruned models for the tests of PERP."""

from __future__ import annotations

from typing import Any

import torch
from tiny import make_llama
from torch import Tensor, nn


def make_gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**settings, **dropouts, initializer_range=0.1))


def halve(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Prune half of every decoder matrix at random; the masks."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and (".layers." in name or ".h." in name):
                masks[name] = torch.rand(p.shape, generator=generator) > 0.5
                p.masked_fill_(~masks[name], 0.0)
    return masks


def pruned(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    model = make_llama(**changes) if family == "llama" else make_gpt2()
    halve(model)
    return model.to(dtype)


def train(model: nn.Module, ids: Tensor, steps: int = 4, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Where the decoder's matrices are +0.0 to the bit."""
    bits = {4: torch.int32, 2: torch.int16}
    return {
        name: p.detach().view(bits[p.element_size()]) == 0
        for name, p in model.named_parameters()
        if p.dim() == 2 and (".layers." in name or ".h." in name)
    }
