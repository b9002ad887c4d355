"""The variants of adapters by name: PERP's four, and those that a program registers."""

from __future__ import annotations

import torch

from lightning_prune.perp.layers import (
    CombinedLinear,
    KeptLoRALinear,
    LoRAPruneLinear,
    MaskLoRALinear,
    ScaleLoRALinear,
    SparseLinear,
)

_BUILT_IN = {cls.adapter: cls for cls in (MaskLoRALinear, ScaleLoRALinear, LoRAPruneLinear, KeptLoRALinear)}
_VARIANTS: dict[str, type[SparseLinear]] = dict(_BUILT_IN)


def register_adapter(layer: type[CombinedLinear]) -> None:
    """Make a variant of your own known by its name, for ``adapter=`` everywhere; one of the same name is replaced.

    Files and checkpoints hold the name alone. A program that reads them has to register the variant first: nothing
    that comes with a file is run.

    Args:
        layer: A subclass of `CombinedLinear` with a name in `adapter` and a function `combine`, which is tried out on
            a few numbers here.

    Raises:
        TypeError: it is no such class.
        ValueError: the name is empty or that of a built-in variant, or `combine` is not what its docstring asks for.
    """
    if not (isinstance(layer, type) and issubclass(layer, CombinedLinear)):
        raise TypeError(f"layer={layer!r} must be a subclass of lightning_prune.perp.CombinedLinear")
    name = getattr(layer, "adapter", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{layer.__name__}.adapter={name!r} must be the name of the variant, such as 'relative'")
    if name in _BUILT_IN:
        raise ValueError(f"{layer.__name__}.adapter={name!r} is the name of a built-in variant; take another one")
    if layer.combine is CombinedLinear.combine:
        raise ValueError(f"{layer.__name__} must define combine(weight, product), see CombinedLinear.combine")
    _check_combine(layer)
    _VARIANTS[name] = layer


def variant_names() -> tuple[str, ...]:
    """All that are known."""
    return tuple(_VARIANTS)


def find_variant(adapter: object) -> type[SparseLinear]:
    """The layer class of a variant.

    Raises:
        ValueError: none of this name is known.
    """
    # A name from a damaged file may be anything, also what no dictionary takes as a key.
    found = _VARIANTS.get(adapter) if isinstance(adapter, str) else None
    if found is None:
        raise ValueError(
            f"adapter={adapter!r} must be one of {variant_names()}, or None for no adapters; one of your own has to be "
            "registered first (lightning_prune.perp.register_adapter)"
        )
    return found


def _check_combine(layer: type[CombinedLinear]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, product = torch.randn(2, 3, 4, generator=generator)  # [P, Q] each
    where, before = f"{layer.__name__}.combine(weight, product)", weight.clone()
    combined = layer.combine(weight, product.requires_grad_())
    if not isinstance(combined, torch.Tensor) or combined.shape != weight.shape or combined.dtype != weight.dtype:
        raise ValueError(f"{where} must return a tensor of the shape and dtype of weight")
    if not torch.equal(weight, before):
        raise ValueError(f"{where} changes weight in place, which is the model's; return a new tensor")
    if not combined.requires_grad:
        raise ValueError(f"{where} has no gradient by product, so that nothing would be trained")
    if not torch.allclose(layer.combine(weight[:1, :1], product[:1, :1]), combined[:1, :1]):
        raise ValueError(f"{where} must be element by element: its first number depends on others than the first two")
    starts_at_zero = layer.reset_lora_parameters is CombinedLinear.reset_lora_parameters
    if starts_at_zero and not torch.allclose(layer.combine(weight, torch.zeros_like(weight)), weight):
        raise ValueError(
            f"{where} must be weight where product is zero, as it is at the start; or override reset_lora_parameters, "
            "so that the adapter starts from the pruned model"
        )
