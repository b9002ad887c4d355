"""What tests of adapters that run a layer with another weight in its place (experts, convolutions) have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.perp import CombinedLinear, adapter_masks, add_adapters, register_adapter, remove_adapters
from lightning_prune.perp.adapters import adapters_aside, fold
from lightning_prune.perp.layers import sparse_layers

EXACT = ["mask_lora", "scale_lora", "hira", "signed"]  # the model that trains is the one that is merged


class Signed(CombinedLinear):
    """W * exp(s B A), of CONTRIBUTING.md."""

    adapter = "signed"

    @staticmethod
    def combine(weight: Tensor, product: Tensor) -> Tensor:
        return weight * product.exp()


register_adapter(Signed)


def combined(adapter: str, w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """A matrix ``[O, I]``, of one expert or of a kernel's rows, with its adapter, as training has it."""
    kept = (w != 0).to(w.dtype)
    return {
        "mask_lora": lambda: w + s * kept * (b @ a),
        "scale_lora": lambda: w * (b @ a),
        "hira": lambda: w + w * (b @ a),
        "signed": lambda: w * torch.exp(s * (b @ a)),
        "lora_prune": lambda: w + s * (b @ a),
        "lora": lambda: w + s * (b @ a),
    }[adapter]()


def adapted(model: nn.Module, **options: Any) -> set[str]:
    """Names of what gets an adapter, of a model that has none afterwards."""
    wrapped = add_adapters(model, r=2, **options)
    names = {name for name, _ in sparse_layers(wrapped)}
    remove_adapters(wrapped)
    return names


def check_merge_in_place(model: Any, weights: dict[str, Tensor], run: Callable[[nn.Module], Tensor]) -> None:
    """A merge in place, one undone, adapters put aside and switched off: outputs and weights are the same to the bit.

    Args:
        model: With adapters that are no longer at their start; it has none afterwards.
        weights: Of the model before it had any.
        run: What the model makes of fixed inputs.
    """
    y = run(model)
    model.merge_adapter()
    assert torch.equal(run(model), y)
    model.unmerge_adapter()
    assert torch.equal(run(model), y)
    with adapters_aside(model) as aside:
        assert not [module for module in aside.modules() if hasattr(module, "base_layer")]
        base = run(aside)
    assert torch.equal(run(model), y)
    with model.disable_adapter():
        assert torch.equal(run(model), base)
        assert not torch.equal(base, y)
    assert torch.equal(run(model), y)
    plain = remove_adapters(model)
    assert all(torch.equal(p, weights[name]) for name, p in plain.named_parameters())


def check_fold(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """`fold` begins anew, with other adapters, from a model that computes the same, under the same masks."""
    y, masks = run(model), adapter_masks(model)
    before = [m.detach().clone() for _, layer in sparse_layers(model) for m in layer.matrices()]
    fold(model)
    torch.testing.assert_close(run(model), y, rtol=1e-9, atol=1e-10)
    after = [m for _, layer in sparse_layers(model) for m in layer.matrices()]
    assert all(not torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert all(torch.equal(mask, masks[name]) for name, mask in adapter_masks(model).items())
