"""A tiny language model of torch's own encoder layers, whose attention holds its matrices inside."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.pruning.running import causal_lm_losses


class TorchCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(64, 24)
        self.model.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.lm_head = nn.Linear(24, 64, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        x = self.model.embed(input_ids)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for layer in self.model.layers:
            x = layer(x, src_mask=later, src_key_padding_mask=attention_mask == 0)
        logits = self.lm_head(x)
        return SimpleNamespace(logits=logits, loss=None if labels is None else causal_lm_losses(logits, labels).mean())
