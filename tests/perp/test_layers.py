"""What the layers rely on in PyTorch and PEFT without a public promise: seen here first where it changes."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from peft import LoraConfig
from peft.tuners import lora
from perp_models import pruned
from tiny import snapshot
from torch import nn

from lightning_prune.perp import add_adapters
from lightning_prune.perp.convolutions import SparseConvolution
from lightning_prune.perp.experts import SparseExperts
from lightning_prune.perp.layers import SparseLinear
from lightning_prune.pruning.running import has_hooks


def nothing(*args: object) -> None:
    """A hook."""


@pytest.mark.parametrize(
    ("register", "options"),
    [
        ("register_forward_hook", {}),
        ("register_forward_hook", {"with_kwargs": True}),
        ("register_forward_hook", {"always_call": True}),
        ("register_forward_pre_hook", {}),
        ("register_forward_pre_hook", {"with_kwargs": True}),
        ("register_full_backward_hook", {}),
        ("register_full_backward_pre_hook", {}),
    ],
    ids=str,
)
def test_every_kind_of_hook_is_seen(register: str, options: dict[str, bool]) -> None:
    layer = nn.Linear(2, 2)
    assert not has_hooks(layer)
    handle = getattr(layer, register)(nothing, **options)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)


def test_layers_that_peft_builds_as_its_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraConfig, "_register_custom_module", lambda self, mapping: None)
    model = pruned()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"PEFT .* has put a Linear on 'model\.layers\.0.* would fill its zeros"):
        add_adapters(model)
    assert snapshot(model) == before
    assert not any(isinstance(module, lora.Linear) for module in model.modules())


@pytest.mark.parametrize(
    ("own", "base", "name"),
    [
        *((SparseLinear, lora.Linear, n) for n in ("resolve_lora_variant", "update_layer", "supports_lora_conversion")),
        *((SparseExperts, lora.ParamWrapper, name) for name in ("update_layer", "merge", "unmerge")),
        *((SparseConvolution, lora.Conv2d, name) for name in ("update_layer", "merge", "unmerge")),
    ],
)
def test_overridden_methods_are_still_those_of_peft(own: type, base: type, name: str) -> None:
    theirs = inspect.signature(getattr(base, name)).parameters
    ours = inspect.signature(getattr(own, name)).parameters
    named = {parameter for parameter in ours.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    assert {parameter.name for parameter in named} <= theirs.keys()


def test_peft_still_says_which_options_are_variants() -> None:
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert "use_dora" in variants
