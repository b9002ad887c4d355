"""Run a model for calibration: its inputs, its loss, and everything about it that must be as before afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batches import padding_mask, to_device
from lightning_prune.losses import causal_lm_losses
from lightning_prune.targets import Target, block_classes, type_name


def causal_lm_loss(model: nn.Module, batch: Any) -> Tensor:
    """Next-token cross-entropy of each sample, ``[B]``, of a transformers causal language model.

    Labels are ``batch["labels"]``, else the input ids without padding.

    Raises:
        ValueError: the batch or the model's output is not that of a language model.
    """
    inputs = _model_inputs(batch)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(inputs, dict) or "input_ids" not in inputs:
        raise ValueError(
            f"this score needs a loss: give a dict with input_ids for a causal language model (got "
            f"{type(batch).__name__}), or pass loss_fn=f(model, batch)"
        )
    if labels is None:
        mask = padding_mask(batch)
        labels = inputs["input_ids"]
        if mask is not None:
            real = mask.clone()
            real[:, 1:] &= mask[:, :-1]  # padding on the left does not predict the first token either
            labels = labels.masked_fill(~real, -100)
    logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{type(model).__name__} returns no logits; pass loss_fn=f(model, batch)")
    return causal_lm_losses(logits, labels)


def forward(model: nn.Module, batch: Any, targets: Sequence[Target]) -> None:
    """Run the model for its layers' inputs alone: a language model without its head if no target is there."""
    inputs = _model_inputs(batch)
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model and isinstance(inputs, dict):
        inside = set(body.modules())
        if all(module in inside for target in targets for module in target.modules):
            model = body
    if isinstance(inputs, dict):
        model(**inputs)
    else:
        model(inputs)


def _model_inputs(batch: Any) -> Any:
    """What the model's forward takes: keyword arguments of a dict, the first part of a tuple, or a tensor."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    if isinstance(batch, (list, tuple)):
        return batch[0]
    if isinstance(batch, Tensor) and not batch.is_floating_point() and batch.dim() == 2:
        return {"input_ids": batch}
    return batch


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def on_device(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, moved to the model's device one by one."""
    device = model_device(model)
    for batch in batches:
        yield to_device(batch, device)


@contextmanager
def quiet_model(model: nn.Module, freeze: bool) -> Iterator[None]:
    """Evaluation mode, no cache of keys and values, eager execution, random state forked; undone at the end.

    With `freeze`, no parameter requires a gradient meanwhile, so backward makes none and existing ``.grad`` stay.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    caches = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    trainable = [p for p in model.parameters() if p.requires_grad] if freeze else []
    device = model_device(model)
    devices = [device] if device.type == "cuda" else []
    # A compiled model would not see hooks that were added after it was compiled.
    stance = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices=devices), stance:
        try:
            checkpointed = _checkpointed_layers(model) if freeze else set()
            for module, _ in modes:
                module.training = module in checkpointed
            for config in caches:
                config.use_cache = False
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for config in caches:
                config.use_cache = True
            for module, mode in modes:
                module.training = mode


def _checkpointed_layers(model: nn.Module) -> set[nn.Module]:
    """Layers that must stay in training mode, alone, so that transformers goes on checkpointing them.

    It checkpoints only layers in training mode, and a batch that fits in training may not fit without. Their parts
    are in evaluation mode all the same; a layer that applies dropout by itself is left out.
    """
    classes, layers = block_classes(model), set()
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not (module.training and getattr(module, "gradient_checkpointing", False) and function is not None):
            continue
        # Re-entrant checkpoints give no gradient unless an input requires one, and here all parameters are frozen.
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
        drops = any("drop" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())
        if not reentrant and not drops and type_name(module) in classes:
            layers.add(module)
    return layers
