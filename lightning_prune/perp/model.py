"""`SparsePeftModel`: a PEFT model whose own ways to save, load and merge keep what PEFT's would lose."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_prune.targets import RETRAINING as _RECORD


@dataclass(frozen=True)
class Retraining:
    """What `add_adapters` did to a model, kept at the plain model until the merge.

    Attributes:
        adapter: The variant, or None.
        train: Parts of the model trained beside it.
        options: LoRA options, with target_modules as the list of adapted modules.
        trained: Names of the model's own parameters that are trained.
        required_grad: Names of those that required a gradient before.
        input_hooks: Ids of the hooks that the input embeddings had before.
    """

    adapter: str | None
    train: tuple[str, ...]
    options: dict[str, Any]
    trained: tuple[str, ...]
    required_grad: frozenset[str] = field(repr=False)
    input_hooks: frozenset[int] = field(repr=False)


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model as it is."""
    if not isinstance(model, PeftModel):
        return model
    plain = model.get_base_model()
    assert isinstance(plain, nn.Module)
    return plain


def find_retraining(model: nn.Module) -> Retraining | None:
    """The record of `add_adapters`, or None."""
    record = plain_model(model).__dict__.get(_RECORD)
    return record if isinstance(record, Retraining) else None


def retraining_of(model: nn.Module) -> Retraining:
    """The record of `add_adapters`.

    Raises:
        ValueError: the model is none of `add_adapters`.
    """
    record = find_retraining(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} is no model of add_adapters; call model = add_adapters(model) first")
    return record


def remember(model: nn.Module, record: Retraining | None) -> None:
    """Attach the record to a plain model, or remove it."""
    if record is None:
        model.__dict__.pop(_RECORD, None)
    else:
        # Not through nn.Module, which looks every attribute over for parameters.
        model.__dict__[_RECORD] = record


class SparsePeftModel(PeftModel):
    """A `peft.PeftModel` of `add_adapters`.

    ``save_pretrained``, ``from_pretrained`` and ``merge_and_unload`` are `save_adapter`, `load_adapter` and `merge`;
    the rest is PEFT's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the transformers model.

        Raises:
            ValueError: ``fully_shard`` was given this wrapper, which the merge takes off, and its shards with it.
        """
        if isinstance(self, FSDPModule):
            raise ValueError(
                "fully_shard was called on the PEFT model, which does not outlive the merge; call it on the "
                "transformers model in it: fully_shard(model.get_base_model())"
            )
        return super().forward(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """See `lightning_prune.perp.save_adapter`.

        Raises:
            TypeError: an argument of PEFT's method that has no meaning here.
        """
        from lightning_prune.perp.storage import save_adapter

        # Given by callers that save any model; they ask for nothing else than what is done.
        harmless = {"safe_serialization": True, "is_main_process": True, "state_dict": None}
        refused = {k: v for k, v in kwargs.items() if k not in harmless or (k == "safe_serialization" and not v)}
        if refused:
            raise TypeError(f"save_pretrained of a sparse adapter does not take {sorted(refused)}; leave them out")
        if kwargs.get("is_main_process", True):
            save_adapter(self, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: nn.Module, model_id: str | Path, is_trainable: bool = False
    ) -> nn.Module:
        """See `lightning_prune.perp.load_adapter`."""
        from lightning_prune.perp.storage import load_adapter

        return load_adapter(model, model_id, trainable=is_trainable)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """See `lightning_prune.perp.merge`; the merge is always checked, so `safe_merge` makes no difference."""
        from lightning_prune.perp.adapters import merge

        return merge(self)

    def unload(self) -> nn.Module:
        """See `lightning_prune.perp.remove_adapters`."""
        from lightning_prune.perp.adapters import remove_adapters

        return remove_adapters(self)
