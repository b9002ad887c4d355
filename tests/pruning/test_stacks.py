"""Models with several stacks of blocks, block by block: against running the whole, partly pruned model each time."""

import copy
import math

import pytest
import torch
import transformers as tf
from batch_models import build, mask_of, normal, padded, tokens
from tiny import make_llama, make_tokens, snapshot
from torch import nn

from lightning_prune import CalibrationError, prune
from lightning_prune.pruning.stacks import find_blocks, find_stacks, likely_stacks

LENGTHS, TARGETS = [9, 5, 3], [4, 9, 6]
SOURCE = {
    "input_ids": padded([tokens(n, seed=n) for n in LENGTHS], 1),
    "attention_mask": mask_of(LENGTHS),
}
LABELS = padded([tokens(n, seed=n) for n in TARGETS], -100)
IMAGES = normal(3, 3, 16, 16).double()
# Model, batch, samples without padding, and the stacks in the order they run.
SEVERAL = {
    "bart": ({**SOURCE, "labels": LABELS}, ["model.encoder.layers", "model.decoder.layers"]),
    "t5": ({**SOURCE, "labels": LABELS}, ["encoder.block", "decoder.block"]),
    "whisper": (
        {"input_features": normal(3, 8, 40).double(), "labels": LABELS},
        ["model.encoder.layers", "model.decoder.layers"],
    ),
    "encoder decoder": ({**SOURCE, "labels": LABELS}, ["encoder.encoder.layer", "decoder.bert.encoder.layer"]),
    "clip": ({**SOURCE, "pixel_values": IMAGES}, None),
    "llava": (
        {
            "input_ids": torch.cat([torch.full((3, 4), 99), SOURCE["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones(3, 4, dtype=torch.long), SOURCE["attention_mask"]], 1),
            "pixel_values": IMAGES,
        },
        ["model.vision_tower.encoder.layers", "model.language_model.layers"],
    ),
}


def unpadded(batch, index):
    sample = {k: v[index : index + 1] for k, v in batch.items()}
    if "attention_mask" in sample:
        real = sample["attention_mask"][0].bool()
        sample = {k: v[:, real] if k in ("input_ids", "attention_mask") else v for k, v in sample.items()}
    if "labels" in sample:
        sample["labels"] = sample["labels"][:, sample["labels"][0] != -100]
    return sample


def naive_wanda(model, samples, blocks, sparsity):
    """Block by block, each sample by itself; wanda's rows: the lowest |W| times the norm of the input."""
    model, found = copy.deepcopy(model), {}
    for name, block in [(n, model.get_submodule(n)) for n in blocks]:
        layers = {f"{name}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        sums = dict.fromkeys(layers, 0.0)
        handles = []
        for key, layer in layers.items():

            def see(_, args, key=key, sums=sums):
                sums[key] = sums[key] + args[0].detach().flatten(0, -2).square().sum(0)

            handles.append(layer.register_forward_pre_hook(see))
        with torch.no_grad():
            for sample in samples:
                model(**sample)
        for handle in handles:
            handle.remove()
        for key, layer in layers.items():
            score = layer.weight.detach().abs() * sums[key].sqrt()
            kept = torch.ones_like(score, dtype=torch.bool)
            lowest = score.argsort(1)[:, : math.floor(sparsity * score.shape[1])]
            found[f"{key}.weight"] = kept.scatter_(1, lowest, False)
            with torch.no_grad():
                layer.weight.mul_(found[f"{key}.weight"])
    return found


def outside_of(model):
    inside = {m for _, block in find_blocks(model) for m in block.modules()}
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and m not in inside]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_each_stack_meets_what_the_pruned_stacks_before_it_give(name):
    model = build(name)
    model.config.use_cache = False
    batch, order = SEVERAL[name]
    stacks = {stack[0][0].rpartition(".")[0]: [n for n, _ in stack] for stack in find_stacks(model)}
    assert len(stacks) == 2
    blocks = [n for stack in order or stacks for n in stacks[stack]]
    expected = naive_wanda(model, [unpadded(batch, i) for i in range(3)], blocks, 0.5)
    ignore = outside_of(model)
    how = {"score": "wanda", "num_samples": 3, "ignore": ignore, "progress": False}
    for batches in ([batch], iter([batch]), [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]):
        found = prune(copy.deepcopy(model), batches, sequential=True, **how)
        assert set(found) == set(expected)
        different = sum(int((found[n] != expected[n]).sum()) for n in expected)
        assert different <= 2e-3 * sum(m.numel() for m in expected.values())  # ties of rounding in float32
    dense = prune(copy.deepcopy(model), [batch], **how)
    last = blocks[-1]
    assert any(not torch.equal(dense[n], found[n]) for n in found if n.startswith(f"{last}."))


def test_a_stack_without_targets_runs_as_it_is():
    model = build("bart")
    model.config.use_cache = False
    batch, _ = SEVERAL["bart"]
    blocks = [n for n, _ in find_blocks(model) if "decoder" in n]
    expected = naive_wanda(model, [unpadded(batch, i) for i in range(3)], blocks, 0.5)
    ignore = ["lm_head", "model.encoder"]
    found = prune(model, [batch], "wanda", sequential=True, num_samples=3, ignore=ignore, progress=False)
    different = sum(int((found[n] != expected[n]).sum()) for n in expected)
    assert set(found) == set(expected)
    assert different <= 2e-3 * sum(m.numel() for m in expected.values())


def test_samples_that_miss_a_stack():
    """Text alone beside text with images: the image encoder counts the samples that have one."""
    model = build("llava")
    model.config.use_cache = False
    batch, _ = SEVERAL["llava"]
    alone = {"input_ids": tokens(1, 6) % 90 + 3, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    ignore = outside_of(model)
    how = {"score": "wanda", "sequential": True, "ignore": ignore, "progress": False}
    found = prune(copy.deepcopy(model), [alone, batch], num_samples=4, **how)
    images = prune(copy.deepcopy(model), [batch], num_samples=3, **how)
    tower = [n for n in found if "vision_tower" in n]
    assert tower
    assert all(torch.equal(found[n], images[n]) for n in tower)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"no calibration sample reached the 2 CLIPEncoderLayer blocks"):
        prune(model, [alone], num_samples=1, **how)
    assert snapshot(model) == before


def test_layers_outside_all_stacks_are_named():
    model = build("llava")
    with pytest.raises(ValueError, match=r"'model\.multi_modal_projector\.linear_1\.weight'.* outside the"):
        prune(model, [SEVERAL["llava"][0]], "wanda", sequential=True, num_samples=3)


def test_an_interrupt_in_the_second_stack_restores_the_first():
    model = build("t5")
    before, seen = snapshot(model), []

    def interrupt(*_):
        seen.append(bool((model.encoder.block[0].layer[0].SelfAttention.q.weight == 0).any()))
        if seen[-1]:
            raise KeyboardInterrupt

    handle = model.decoder.block[0].layer[1].EncDecAttention.k.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, [SEVERAL["t5"][0]], "sparsegpt", sequential=True, num_samples=3, progress=False)
    handle.remove()
    assert seen[-1]
    assert snapshot(model) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_blocks_of_one_stack_inside_another_are_no_stack():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Inner(), Inner()])

    class Model(nn.Module):
        _no_split_modules = ("Inner", "Outer")

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.ModuleList([Outer()]), nn.ModuleList([Inner()])

    assert [[n for n, _ in stack] for stack in find_stacks(Model())] == [["first.0"], ["second.0"]]


@pytest.mark.slow
def test_reconstruction_goes_through_each_stack():
    from lightning_prune.perp import reconstruct

    dense = build("bart").float()
    model, batch = copy.deepcopy(dense), SEVERAL["bart"][0]
    prune(model, [batch], "wanda", num_samples=3, progress=False)
    zeros = {n: p == 0 for n, p in model.named_parameters() if (p == 0).any() and p.dim() == 2}
    result = reconstruct(model, [batch], dense, num_samples=3, steps=8, progress=False)
    names = [block.name for block in result.blocks]
    assert names == [f"model.{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(2)]
    assert all(block.changed and block.after < block.before for block in result.blocks)
    parameters = dict(model.named_parameters())
    assert all(bool((parameters[n][zero] == 0).all()) for n, zero in zeros.items() if ".layers." in n)


def test_one_stack_still_takes_a_generator():
    model, ids = make_llama(), make_tokens(2, 8)
    found = prune(copy.deepcopy(model), (b for b in ids.split(1)), "wanda", sequential=True, num_samples=2)
    again = prune(model, [ids], "wanda", sequential=True, num_samples=2)
    assert all(torch.equal(found[n], again[n]) for n in found)


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
UNNAMED = {
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.2)
    ),
    "electra": lambda: tf.ElectraModel(tf.ElectraConfig(**SMALL, embedding_size=32, initializer_range=0.2)),
    "deberta": lambda: tf.DebertaV2Model(
        tf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], initializer_range=0.2)
    ),
    "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**SMALL, initializer_range=0.2), add_pooling_layer=False),
    "xlnet": lambda: tf.XLNetModel(
        tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.2)
    ),
}


@pytest.mark.filterwarnings("ignore:prune. .* weights are candidates", "ignore:the padding of the batches")
@pytest.mark.parametrize("name", UNNAMED)
def test_families_that_name_no_blocks(name):
    torch.manual_seed(0)
    model = UNNAMED[name]().double().eval()
    assert find_stacks(model) == []
    blocks = [block for stack in likely_stacks(model) for block, _ in stack]
    assert len(blocks) == 2
    batch = {**SOURCE, "input_ids": SOURCE["input_ids"] % 64}
    expected = naive_wanda(model, [unpadded(batch, i) for i in range(3)], blocks, 0.5)
    found = prune(model, [batch], "wanda", sequential=True, num_samples=3, progress=False)
    assert set(found) == set(expected)
    different = sum(int((found[n] != expected[n]).sum()) for n in expected)
    assert different <= 2e-3 * sum(m.numel() for m in expected.values())


def test_lists_with_gaps_are_no_stacks():
    # Informer has convolutions between its layers, and None behind the last.
    model = nn.ModuleDict({"between": nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), None]), "last": nn.Linear(4, 4)})
    assert find_stacks(model) == likely_stacks(model) == []
    assert len(prune(model, score="magnitude")) == 2
