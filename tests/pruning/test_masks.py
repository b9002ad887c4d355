"""Masks on weights and in files: exact round trips, and damage that is found and named."""

import copy
import io
import math
import os
import signal

import pytest
import torch
from tiny import packed
from torch import nn

from lightning_prune.pruning.masks import (
    PackedMasks,
    apply_masks,
    mask_sparsity,
    masks_from_zeros,
    pack_masks,
    unpack_masks,
)
from lightning_prune.pruning.targets import find_targets
from lightning_prune.safety import uninterrupted


def test_packed_masks_are_a_mapping_of_an_eighth_of_the_memory():
    masks = some_masks()
    packed = PackedMasks(iter(masks.items()))
    assert list(packed) == list(masks)
    assert all(packed[name].dtype == torch.bool and torch.equal(packed[name], mask) for name, mask in masks.items())
    assert sum(bits.nbytes for bits, _ in packed._packed.values()) == sum(-(-m.numel() // 8) for m in masks.values())
    packed["a.weight"].fill_(False)  # a copy
    assert torch.equal(packed["a.weight"], masks["a.weight"])
    copied = copy.deepcopy(packed)
    del packed["a.weight"]
    packed["c"] = torch.zeros(3, dtype=torch.bool)
    assert [*packed, *copied] == ["b.weight", "c", "a.weight", "b.weight"]
    joined = copied | {"b.weight": ~masks["b.weight"]}
    assert torch.equal(joined["b.weight"], ~masks["b.weight"])
    assert list(joined.renamed(str.upper)) == ["A.WEIGHT", "B.WEIGHT"]
    assert PackedMasks() == {}
    alike = copy.copy(joined)
    assert alike == joined == dict(joined) != copied
    del alike["a.weight"]
    assert "a.weight" in joined
    with pytest.raises(ValueError, match=r"the mask of 'd' has dtype torch\.float32"):
        packed["d"] = torch.ones(2)


def some_masks():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.rand(7, 9, generator=generator) < 0.5,
        "b.weight": torch.rand(3, 2, 3, 3, generator=generator) < 0.3,
    }


def test_state_survives_a_checkpoint_file_loaded_with_weights_only():
    masks = some_masks()
    file = io.BytesIO()
    torch.save({"state": pack_masks(masks)}, file)
    file.seek(0)
    loaded = unpack_masks(torch.load(file, weights_only=True)["state"])
    assert list(loaded) == list(masks)
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert all(mask.dtype == torch.bool for mask in loaded.values())


def flip_bit(entry):
    entry["bits"][2] ^= 16


def truncate(entry):
    entry["bits"] = entry["bits"][:-1]


def lengthen(entry):
    entry["bits"] = torch.cat([entry["bits"], torch.zeros(1, dtype=torch.uint8)])


def wrong_dtype(entry):
    entry["bits"] = entry["bits"].to(torch.int8)


def not_a_tensor(entry):
    entry["bits"] = entry["bits"].tolist()


def wrong_crc(entry):
    entry["crc32"] += 1


def larger_shape(entry):
    entry["shape"] = [7, 99]


def negative_shape(entry):
    entry["shape"] = [-7, -9]


def text_shape(entry):
    entry["shape"] = ["7", "9"]


def scalar_shape(entry):
    entry["shape"] = 63


def no_crc(entry):
    del entry["crc32"]


def no_bits(entry):
    del entry["bits"]


@pytest.mark.parametrize(
    "damage",
    [
        flip_bit,
        truncate,
        lengthen,
        wrong_dtype,
        not_a_tensor,
        wrong_crc,
        larger_shape,
        negative_shape,
        text_shape,
        scalar_shape,
        no_crc,
        no_bits,
    ],
)
def test_damage_is_refused_naming_the_parameter(damage):
    state = pack_masks(some_masks())
    damage(state["a.weight"])
    with pytest.raises(ValueError, match=r"the saved mask of 'a\.weight' is damaged"):
        unpack_masks(state)


@pytest.mark.parametrize("entry", [None, 3, "mask", [1, 2], torch.ones(8, dtype=torch.uint8)])
def test_an_entry_of_another_kind_is_refused_naming_the_parameter(entry):
    with pytest.raises(ValueError, match=r"the saved mask of 'a\.weight' is damaged"):
        unpack_masks({"a.weight": entry})


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)).to(dtype)


def random_masks(model):
    return {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.5 for i in (0, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_apply_masks_writes_positive_zeros_and_nothing_else(dtype):
    model = two_layers(dtype)
    masks = random_masks(model)
    with torch.no_grad():
        for value in (math.inf, -math.inf, math.nan, -1.0, -0.0):
            model[0].weight[~masks["0.weight"]] = torch.tensor(value, dtype=dtype)
            before = copy.deepcopy(model)
            apply_masks(model, masks)
            for i in (0, 2):
                weight, mask = model[i].weight, masks[f"{i}.weight"]
                assert (weight.view(torch.uint8).view(*weight.shape, -1)[~mask] == 0).all()
                assert torch.equal(weight[mask], before[i].weight[mask])
                assert torch.equal(model[i].bias, before[i].bias)


def test_apply_masks_to_a_compiled_model():
    model = two_layers()
    masks = random_masks(model)
    apply_masks(torch.compile(model, backend="eager"), masks)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])


def test_a_quantized_weight_is_refused_by_name():
    model = two_layers()
    packed(model[2])
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'2\.weight' is quantized \(Packed\)"):
        apply_masks(model, random_masks(model))
    assert torch.equal(model[0].weight, before)


def test_masks_of_another_model_change_nothing():
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    good = random_masks(model)
    for bad, message in [
        ({**good, "5.weight": good["0.weight"]}, r"mask for '5\.weight', but Sequential has no such parameter"),
        ({**good, "2.weight": good["0.weight"]}, r"mask of '2\.weight' has shape \(7, 9\), the parameter \(4, 7\)"),
        ({**good, "2.weight": good["2.weight"].float()}, r"mask of '2\.weight' has dtype torch\.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_masks(model, bad)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mask_sparsity_counts_over_all_masks():
    masks = {"a": torch.tensor([True, False, False, False]), "b": torch.ones(12, dtype=torch.bool)}
    assert mask_sparsity(masks) == pytest.approx(3 / 16)
    assert mask_sparsity({}) == 0.0


def test_masks_from_zeros():
    model = two_layers()
    targets = find_targets(model)
    with pytest.raises(ValueError, match="none of the 2 layers has one"):
        masks_from_zeros(targets)
    with torch.no_grad():
        model[0].weight[0, :3] = 0.0
        model[0].weight[0, 4] = -0.0
    masks = masks_from_zeros(targets)
    assert (~masks["0.weight"]).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 4]]
    assert masks["2.weight"].all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_the_block_is_done(number):
    steps, received = [], []
    previous = signal.signal(number, lambda n, frame: received.append((n, len(steps))))
    try:
        with uninterrupted():
            steps.append("before")
            os.kill(os.getpid(), number)
            steps.append("after")
        assert received == [(number, 2)]
        os.kill(os.getpid(), number)  # the old handler is back
        assert len(received) == 2
    finally:
        signal.signal(number, previous)


def test_an_interrupt_during_apply_masks_leaves_no_half_pruned_model(monkeypatch):
    model = two_layers()
    masks = random_masks(model)
    original = torch.Tensor.bitwise_and_
    calls = []

    def interrupting(self, *args):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(torch.Tensor, "bitwise_and_", interrupting)
    with pytest.raises(KeyboardInterrupt):
        apply_masks(model, masks)
    assert len(calls) == 2
    for i in (0, 2):
        assert torch.equal(model[i].weight != 0, masks[f"{i}.weight"])
