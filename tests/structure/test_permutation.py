"""Orders of channels for N:M: the model computes the same, its weights are only moved, and masks keep more."""

import copy
import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from experts_models import make_moe
from tiny import make_llama, make_tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

from lightning_prune import prune
from lightning_prune.pruning.patterns import NM
from lightning_prune.structure import permutation, permute_channels, read_structure
from lightning_prune.structure.permutation import best_order, kept_scores

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": lambda: make_llama(tie_word_embeddings=True),
    "qwen3": lambda: AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, **HEADS)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, **TOKENS)
    ),
    "opt": lambda: AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                  word_embed_proj_dim=16, max_position_embeddings=16)
    ),
    "gpt_neox": lambda: AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES, num_attention_heads=2)),
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return model, make_tokens(4, 12, 32)


def input_norms(model, layers, tokens):
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, x, _: seen.update({m: x[0].reshape(-1, x[0].shape[-1]).norm(dim=0)}))
        for layer in layers
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def naive_kept(scores, n, m):
    groups = np.sort(scores.reshape(len(scores), -1, m), axis=-1)
    return groups[..., m - n :].sum()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [("hidden",), ("values",), ("ffn",), ("hidden", "values", "ffn")], ids="+".join)
def test_the_model_computes_the_same_with_moved_weights(name, channels):
    model, tokens = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(tokens).logits
        found = permute_channels(model, [tokens], "2:4", channels, num_samples=4, progress=False)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # RMS norms are in float32
        if name in ("gpt2", "opt", "gpt_neox"):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-11, atol=1e-11)
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(torch.equal(before[n].flatten().sort().values, p.flatten().sort().values)
               for n, p in model.named_parameters())  # fmt: skip
    assert set(found.before) == set(found.after) == set(channels)
    assert all(found.before[kind] < found.after[kind] for kind in channels)


def test_shares_are_those_of_the_masks_that_are_made_then():
    model, tokens = build("opt")
    twin = copy.deepcopy(model)
    found = permute_channels(model, [tokens], "2:4", ("ffn",), num_samples=4, progress=False)
    for made, share in ((twin, found.before["ffn"]), (model, found.after["ffn"])):
        kept, total = 0.0, 0.0
        layers = [block.fc2 for block in made.model.decoder.layers]
        norms = input_norms(made, layers, tokens)
        scores = {layer: (layer.weight.detach().abs() * norms[layer]).numpy() for layer in layers}
        masks = prune(made, [tokens], "wanda", pattern="2:4", num_samples=4, progress=False)
        for number, layer in enumerate(layers):
            mask = masks[f"model.decoder.layers.{number}.fc2.weight"].numpy()
            kept, total = kept + (scores[layer] * mask).sum(), total + scores[layer].sum()
        assert kept / total == pytest.approx(share, rel=1e-5)


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates")
@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ({"targets": ["o_proj", "layers.0.mlp.down_proj"]}, ["values", "ffn"]),
        ({"targets": ["up_proj"]}, ["hidden"]),
        ({"ignore": []}, ["hidden", "values", "ffn"]),
    ],
    ids=str,
)
def test_only_layers_that_will_be_pruned_count(layers, kinds):
    """The shares by `prune` with the same layers, and what none of these reads stays where it is."""
    torch.manual_seed(0)
    model, tokens = make_llama(tie_word_embeddings=False).double(), make_tokens(4, 12)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    twin = copy.deepcopy(model)
    found = permute_channels(model, [tokens], num_samples=4, progress=False, **layers)
    assert set(found.before) == set(kinds)
    readers = {"hidden": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"),
               "values": ("o_proj",), "ffn": ("down_proj",)}  # fmt: skip
    for made, shares in ((twin, found.before), (model, found.after)):
        modules = dict(made.named_modules())
        masks = prune(copy.deepcopy(made), [tokens], "wanda", pattern="2:4", num_samples=4, progress=False, **layers)
        norms = input_norms(made, [modules[n.removesuffix(".weight")] for n in masks], tokens)
        for kind, share in shares.items():
            kept, total = 0.0, 0.0
            for name, mask in masks.items():
                layer = modules[name.removesuffix(".weight")]
                if name.split(".")[-2] in readers[kind]:
                    scores = layer.weight.detach().abs() * norms[layer]
                    kept, total = kept + float((scores * mask).sum()), total + float(scores.sum())
            assert kept / total == pytest.approx(share, rel=1e-5)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, twin.get_parameter(n))}
    assert ("model.embed_tokens.weight" in moved) == ("hidden" in kinds)
    assert any("layers.1.mlp" in n for n in moved) == ("hidden" in kinds)  # its down projection stays in the first case


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4)])
def test_nearly_the_best_of_all_orders(n, m):
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(n)).double() ** 3
    order = best_order(scores, NM(n, m))
    assert sorted(order.tolist()) == list(range(8))
    reached = naive_kept(scores[:, order].numpy(), n, m)
    assert reached == pytest.approx(float(kept_scores(scores[:, order], NM(n, m))))
    every = [
        naive_kept(scores[:, [0, *first, *(c for c in range(1, 8) if c not in first)]].numpy(), n, m)
        for first in combinations(range(1, 8), 3)
    ]
    assert max(every) >= reached >= 0.98 * max(every)
    assert reached >= naive_kept(scores.numpy(), n, m)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "unstructured"}, "for N:M only"),
        ({"pattern": "2:5"}, "do not divide by 5"),
        ({"channels": ("heads",)}, "must be some of"),
        ({"channels": "ffn"}, "must be some of"),
        ({"channels": ()}, "must be some of"),
        ({"num_samples": 0}, "num_samples=0 must be"),
        ({"rounds": -1}, "rounds=-1 must be"),
        (
            {"channels": ("ffn",), "targets": ["fc1"]},
            r"none of the layers.*'model\.decoder\.layers\.0\.fc1.*reads them",
        ),
    ],
)
def test_what_cannot_be_permuted_is_refused(arguments, message):
    model, tokens = build("opt")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        permute_channels(model, [tokens], progress=False, **arguments)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_channels_that_a_model_has_nowhere_to_put_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="no layer to prune reads 'ffn' channels; leave them out"):
        permute_channels(make_moe("mixtral"), [make_tokens(2, 8, 32)], progress=False)
    model, tokens = build("llama")
    known = read_structure(model)
    renamed = {n: tuple("-" if ".v_proj." in n and a == "kv" else a for a in axes) for n, axes in known.axes.items()}
    monkeypatch.setattr(permutation, "read_structure", lambda _: dataclasses.replace(known, axes=renamed))
    with pytest.raises(ValueError, match=r"what writes the values of 'llama' is not known.*\('hidden', 'ffn'\)"):
        permute_channels(model, [tokens], progress=False)


def test_batches_go_to_the_device_of_the_model():
    class Elsewhere(torch.Tensor):
        def to(self, device, **_):
            moved.append(device)
            return self.as_subclass(torch.Tensor)

    moved = []
    model, tokens = build("llama")
    permute_channels(model, [tokens.as_subclass(Elsewhere)], num_samples=4, progress=False)
    assert moved == [torch.device("cpu")]
