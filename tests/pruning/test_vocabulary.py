"""Losses of large vocabularies: logits in pieces give the numbers of the whole, or the whole is made."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lightning_prune.pruning import running
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.running import causal_lm_loss
from lightning_prune.pruning.targets import find_targets

VOCABULARY = 997
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {"llama": LlamaConfig(**SIZES), "tied": Qwen3Config(**SIZES, tie_word_embeddings=True)}
CHANGED = {
    "gemma 2": Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that losses are not all alike
    return model


def batches():
    ids = torch.randint(3, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[2, :6] = -100
    return [{"input_ids": ids[:3], "attention_mask": mask[:3], "labels": labels[:3]}, {"input_ids": ids[3:]}]


@pytest.mark.parametrize("name", [*PLAIN, *CHANGED])
def test_losses_and_statistics_are_those_of_the_whole(name, monkeypatch):
    model = make((PLAIN | CHANGED)[name])
    statistics = {"input_norm", "output_grad_norm", "gradient_l1", "gradient_l2"}

    rows, whole = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *args, **kw: (
        rows.append(len(logits)) or whole(logits, *args, **kw)))  # fmt: skip

    def measured():
        rows.clear()
        losses = torch.cat([causal_lm_loss(model, batch).detach() for batch in batches()])
        found = collect(model, batches(), find_targets(model), statistics, num_samples=5, progress=False)
        return losses, found, max(rows)

    losses, found, most = measured()
    monkeypatch.setattr(running, "_MOST_LOGITS", 8 * VOCABULARY)  # pieces of four rows
    other_losses, other, other_most = measured()
    assert most == 27
    assert (other_most <= 4) == (name in PLAIN)
    torch.testing.assert_close(other_losses, losses, rtol=1e-12, atol=0)
    for layer, expected in found.items():
        for statistic in statistics:
            got = other[layer].get(statistic)
            torch.testing.assert_close(got, expected.get(statistic), rtol=1e-9, atol=1e-15)


def test_what_a_model_does_to_its_logits_unknown_to_us_is_noticed(monkeypatch):
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

        forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)

    model = make(PLAIN["llama"])
    model.__class__ = Scaled
    whole = causal_lm_loss(model, batches()[0])
    monkeypatch.setattr(running, "_MOST_LOGITS", 0)
    assert torch.equal(causal_lm_loss(model, batches()[0]), whole)


def test_a_head_that_is_calibrated_on_sees_all_rows(monkeypatch):
    monkeypatch.setattr(running, "_MOST_LOGITS", 0)
    model = make(PLAIN["llama"])
    targets = find_targets(model, targets=[nn.Linear], ignore=[])
    found = collect(model, batches(), targets, {"output_grad_norm"}, num_samples=5, progress=False)
    assert "lm_head.weight" in found
