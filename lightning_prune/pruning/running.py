"""Run a model for calibration: its inputs, its loss, and everything about it as before afterwards.

Letters: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune.naming import own_parameters, uncompiled
from lightning_prune.pruning.attention_masks import hides_previous
from lightning_prune.pruning.batches import padding_mask, tensors_of, to_device
from lightning_prune.pruning.offloading import device_of
from lightning_prune.pruning.stacks import block_classes
from lightning_prune.pruning.targets import Target
from lightning_prune.safety import ProcessWide
from lightning_prune.sharding import local, runs_alone, type_name

ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Makes the context that a forward pass runs in, such as autocast."""

# What only a loss needs: the forward pass of a model without its head takes none of it.
_LOSS_INPUTS = ("labels", "label", "label_ids", "start_positions", "end_positions", "return_loss")


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a batch has without a `loss_fn`: one a sample ``[B]``, or a scalar.

    Of a transformers model it is the model's own, ``model(**batch).loss``. Causal language models predict each next
    token (`causal_lm_loss`), which gives one loss a sample; they, and modules that are not of transformers, need no
    labels for it.

    Raises:
        ValueError: the model makes no loss of the batch; the message says what to add.
    """
    inner = unwrapped(model)
    if not _is_pretrained(inner) or predicts_next_tokens(model, batch):
        return causal_lm_loss(model, batch)
    inputs = _cast(model, dict(batch))
    if _accepts(inner, "return_loss"):
        inputs.setdefault("return_loss", True)
    output = _run_encoder_decoder(model, inputs)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        needed = [n for n in _LOSS_INPUTS if n != "return_loss" and _accepts(inner, n)]
        add = f"add {' and '.join(map(repr, needed))} to the batches, or " if needed else ""
        raise ValueError(
            f"this score needs a loss, and {type_name(inner)} makes none of a batch of {sorted(map(str, batch))}: "
            f"{add}pass loss_fn=f(model, batch)"
        )
    return loss


def predicts_next_tokens(model: nn.Module, batch: Any) -> bool:
    """Whether `model_loss` gives each sample a loss of its own because the model is a causal one of transformers."""
    inner = unwrapped(model)
    if not _is_pretrained(inner):
        return False
    if not isinstance(batch, Mapping):
        return True
    labeled = any(batch.get(name) is not None for name in _LOSS_INPUTS)
    return _is_causal_lm(inner) and (_shifts_labels(inner) or not labeled)


def causal_lm_loss(model: nn.Module, batch: Any) -> Tensor:
    """Next-token cross-entropy of each sample, ``[B]``, of a causal language model; NaN of one without any label.

    Labels are those of `lightning_prune.pruning.running.next_token_labels`.

    Raises:
        ValueError: the batch or the model's output is not that of a language model.
    """
    inputs = _model_inputs(batch)
    if not isinstance(inputs, dict) or "input_ids" not in inputs:
        raise ValueError(
            f"this score needs a loss: give a dict with input_ids for a causal language model (got "
            f"{type(batch).__name__}), or pass loss_fn=f(model, batch)"
        )
    inputs, labels = _cast(model, inputs), next_token_labels(batch if isinstance(batch, Mapping) else inputs)
    for token in _placeholders(unwrapped(model)):
        labels = labels.masked_fill(labels == token, IGNORE_INDEX)
    losses = _losses_in_pieces(model, inputs, labels)
    if losses is not None:
        return _mean_losses(losses, labels, IGNORE_INDEX)
    logits = getattr(run_batch(model, inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{type(model).__name__} returns no logits; pass loss_fn=f(model, batch)")
    if logits.dim() == 3 and _has_prompt(model):  # no label is of its tokens
        labels = F.pad(labels, (max(logits.shape[1] - labels.shape[1], 0), 0), value=IGNORE_INDEX)
    return causal_lm_losses(logits, labels, allow_empty=True)


def _placeholders(model: nn.Module) -> list[int]:
    """Tokens in whose places a language model gets what it sees and hears: no text, which it could predict."""
    if not _is_pretrained(model):
        return []
    config = vars(cast(Any, model).config)
    found = [config.get(f"{kind}_token_{name}") for kind in ("image", "video", "audio") for name in ("id", "index")]
    return [token for token in found if isinstance(token, int)]


def logits_of_tokens(model: nn.Module, logits: Tensor, input_ids: Tensor) -> Tensor:
    """Leave out the logits of virtual tokens, which PEFT's prompts put before a sample's own.

    Args:
        model: Whose they are.
        logits: ``[B, T', V]``.
        input_ids: ``[B, T]``, what the model was called with.
    """
    return logits[:, -input_ids.shape[1] :] if _has_prompt(model) else logits


def _has_prompt(model: nn.Module) -> bool:
    return getattr(uncompiled(model), "prompt_encoder", None) is not None


# Where there are more logits than these they are made in pieces of half as many, and again in the backward pass.
_MOST_LOGITS = 1 << 27
# What models call that which they do to the logits after the head, in their configurations.
_CHANGES_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def _losses_in_pieces(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor | None:
    """Cross-entropy of every next token, ``[B, T - 1]``, of logits that are never there whole.

    Returns:
        None where there are not many logits, or where they are not what a linear head makes of the last hidden states
        (they are capped or scaled, say), or the head is sharded or calibrated on itself.
    """
    inner = unwrapped(model)
    if not _is_pretrained(inner) or not _accepts(inner, "logits_to_keep"):
        return None
    inner = cast(Any, inner)
    head, body, config = inner.get_output_embeddings(), inner.base_model, inner.config.get_text_config()
    changed = any(getattr(config, name, None) not in (None, 1) for name in _CHANGES_OF_LOGITS)
    plain = type(head) is nn.Linear and not has_hooks(head) and local(head.weight) is head.weight
    if not plain or changed or body is inner or labels.numel() * head.out_features <= _MOST_LOGITS:
        return None
    seen: list[Any] = []
    handle = body.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        last = run_batch(model, {**inputs, "logits_to_keep": 1}).logits
    finally:
        handle.remove()
    hidden = seen[0] if len(seen) == 1 else None
    if (
        not isinstance(hidden, Tensor)
        or hidden.shape[:2] != labels.shape
        or not torch.equal(head(hidden[:, -1:]), last)
    ):
        return None
    targets = _next_targets(labels, IGNORE_INDEX)
    rows = max(_MOST_LOGITS // 2 // head.out_features, 1)
    losses = [
        checkpoint(_cross_entropy_of_rows, head, part, wanted, use_reentrant=False, preserve_rng_state=False)
        for part, wanted in zip(
            torch.split(hidden.flatten(0, 1), rows), torch.split(targets.flatten(), rows), strict=True
        )
    ]
    return torch.cat(losses).view(targets.shape)[:, :-1]


def _cross_entropy_of_rows(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return _cross_entropy(head(hidden), targets, IGNORE_INDEX)


def forward(model: nn.Module, batch: Any, targets: Sequence[Target]) -> None:
    """Run the model for its layers' inputs alone: a language model without its head if no target is there.

    An encoder-decoder gets its labels too, of which it makes the decoder's inputs.
    """
    inputs, inner = _model_inputs(batch), unwrapped(model)
    if isinstance(inputs, dict) and _is_pretrained(inner):
        if is_encoder_decoder(inner):
            labels = {n: batch[n] for n in ("labels",) if n in batch and _accepts(inner, n)}
            _run_encoder_decoder(model, _cast(model, {**inputs, **labels}))
            return
        inputs = {name: value for name, value in inputs.items() if name not in _LOSS_INPUTS}
    inputs = _cast(model, inputs)
    # PEFT's prompts and prefixes are not in what it calls the base model.
    body = getattr(model, "base_model", None) if _is_body_and_head(inner) and not _has_prompt(model) else None
    if isinstance(body, nn.Module) and body is not model and isinstance(inputs, dict) and runs_alone(body, model):
        inside = set(body.modules())
        known = all(name not in inputs or _accepts(body, name) for name in ("input_ids", "inputs_embeds"))
        if known and all(module in inside for target in targets for module in target.holders):
            model = body
    if isinstance(inputs, dict):
        run_batch(model, inputs)
    else:
        model(inputs)


def _is_body_and_head(model: nn.Module) -> bool:
    """Whether all that a model does before its head is its body's, which gets the inputs as they are.

    So it is in transformers' own models with a head of a vocabulary. Others may change the inputs, as for a choice of
    several texts, or call the body twice.
    """
    if not _is_pretrained(model) or not type(model).forward.__module__.startswith("transformers."):
        return False
    try:
        return cast(Any, model).get_output_embeddings() is not None
    except NotImplementedError:
        return False


def _run_encoder_decoder(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The model's output; where its decoder has no inputs, an error that says how to give it some."""
    try:
        return run_batch(model, inputs)
    except ValueError as error:
        fed = any(inputs.get(name) is not None for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds"))
        unknown = isinstance(error.__cause__, TypeError)  # columns, see `run_batch`
        whole = is_encoder_decoder(unwrapped(model))
        if fed or unknown or not whole or not any(part in str(error) for part in ("decoder_input", "input_ids")):
            raise
        raise ValueError(
            f"{type_name(unwrapped(model))} is an encoder-decoder whose decoder gets no inputs from a batch of "
            f"{sorted(inputs)}: add 'labels' (of which it makes them) or 'decoder_input_ids' to the batches"
        ) from error


def run_batch(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model with the columns of a batch by name.

    Raises:
        ValueError: its forward pass does not take some of them.
    """
    try:
        return model(**inputs)
    except TypeError as error:
        taken = inspect.signature(type(inner := unwrapped(model)).forward).parameters
        strange = sorted(str(name) for name in inputs if name not in taken)
        if strange and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            raise ValueError(
                f"the batch has {strange}, which the forward pass of {type_name(inner)} does not take (it takes "
                f"{', '.join(list(taken)[1:])}): remove these columns (dataset.remove_columns({strange}), or in the "
                "collate_fn)"
            ) from error
        raise


# -- what a model is -------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DistributedDataParallel and PEFT."""
    while True:
        base = getattr(model, "get_base_model", None)
        inner = uncompiled(model)
        if inner is model and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is model and callable(base):
            inner = base()
        if inner is model:
            return model
        model = inner


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything is to be called around a module's forward or backward pass.

    PyTorch calls such hooks for a module that is called, and has no public way to ask for them.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_pretrained(model: nn.Module) -> bool:
    """Whether the model is one of transformers; if it is, transformers has been imported."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model of transformers reads one text and writes another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_causal_lm(model: nn.Module) -> bool:
    """Whether the model's head predicts the next token of its input."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    names = {name for entry in CAUSAL.values() for name in ([entry] if isinstance(entry, str) else entry)}
    # Those that transformers gives the loss of one: own code from the hub, language models that also take images.
    kind = getattr(model, "loss_type", None)
    like_one = kind == "ForCausalLM" or (kind == "ForConditionalGeneration" and not is_encoder_decoder(model))
    return type_name(model) in names or like_one


def _shifts_labels(model: nn.Module) -> bool:
    """Whether a causal model's own loss compares each position with the next label; a few compare it with its own."""
    function = inspect.unwrap(type(model).forward)
    return "loss_function" in getattr(getattr(function, "__code__", None), "co_names", ())


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _cast(model: nn.Module, inputs: Any) -> Any:
    """Floating-point inputs (images, speech, embeddings) in the model's dtype, as its layers need them."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is None or not isinstance(inputs, (dict, Tensor)):
        return inputs

    def cast(name: str, value: Any) -> Any:
        apart = "mask" in name or "label" in name
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and not apart else value

    return cast("", inputs) if isinstance(inputs, Tensor) else {k: cast(str(k), v) for k, v in inputs.items()}


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
    """The device of the model's first parameter, when it runs."""
    held = ((m, p) for m in model.modules() for p in own_parameters(m).values())
    return next((device_of(m, p) for m, p in held), torch.device("cpu"))


def on_device(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, moved to the model's device one by one."""
    device = model_device(model)
    for batch in batches:
        yield to_device(batch, device)


class RandomStates:
    """The states of random generators of torch, Python and numpy, to draw the same numbers again.

    Args:
        model: Where it runs a generator is looked at too.
    """

    def __init__(self, model: nn.Module) -> None:
        device = model_device(model)
        self.devices = [device] if device.type == "cuda" else []
        self._take()

    def _take(self) -> None:
        self._torch = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self.devices]
        self._others = random.getstate(), np.random.get_state()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Begin from these states while the block runs; afterwards all are where they were before it."""
        now = copy.copy(self)
        now._take()
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        torch.set_rng_state(self._torch[0])
        for device, state in zip(self.devices, self._torch[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._others[0])
        np.random.set_state(self._others[1])


# A compiled model would not see hooks that were added after it was compiled.
_EAGER = ProcessWide(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def quiet_model(model: nn.Module, freeze: bool) -> Iterator[None]:
    """Evaluation mode, no cache of keys and values, eager execution, random state forked; undone at the end.

    An autocast around it casts weights anew in every pass, between which they may change.

    With `freeze`, no parameter requires a gradient meanwhile, so backward makes none and existing ``.grad`` stay.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    caches = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    device = model_device(model)
    devices = [device] if device.type == "cuda" else []
    # What inference mode makes can neither be saved for a backward pass nor watched for changes in place.
    graded, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    normal = torch.inference_mode(False) if inference else nullcontext()
    casts_kept = torch.is_autocast_cache_enabled()
    with normal, torch.set_grad_enabled(graded), torch.random.fork_rng(devices=devices), _EAGER.changed():
        try:
            checkpointed = _checkpointed_layers(model) if freeze else set()
            for module, _ in modes:
                module.training = module in checkpointed
            for config in caches:
                config.use_cache = False
            torch.set_autocast_cache_enabled(False)
            with frozen(model) if freeze else nullcontext():
                yield
        finally:
            torch.set_autocast_cache_enabled(casts_kept)
            for config in caches:
                config.use_cache = True
            try:
                for module, mode in modes:
                    if mode and type(module).train is not nn.Module.train:
                        module.train(True)  # which lets go of what it has kept in evaluation mode, as LeViT does
            finally:
                for module, mode in modes:
                    module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have no parameter require a gradient while the block runs."""
    # By name: a device map makes new parameters with every forward pass.
    trainable = [(m, n) for m in model.modules() for n, p in own_parameters(m).items() if p.requires_grad]
    try:
        for module, name in trainable:
            getattr(module, name).requires_grad_(False)
        yield
    finally:
        for module, name in trainable:
            getattr(module, name).requires_grad_(True)


def _checkpointed_layers(model: nn.Module) -> set[nn.Module]:
    """Layers that must stay in training mode, alone, so that transformers goes on checkpointing them.

    It checkpoints only layers in training mode, and a batch that fits in training may not fit without. Their parts
    are in evaluation mode all the same; a layer that applies dropout by itself is left out.
    """
    classes, layers = block_classes(model), set()
    for module in model.modules():
        if not module.training or (reentrant := _reentrant(module)) is None:
            continue
        # Re-entrant checkpoints give no gradient unless an input requires one, and here all parameters are frozen.
        drops = any("drop" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())
        if not reentrant and not drops and type_name(module) in classes:
            layers.add(module)
    return layers


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Return whether transformers checkpoints some layer of a model the re-entrant way."""
    return any(_reentrant(module) for module in model.modules())


def _reentrant(module: nn.Module) -> bool | None:
    """Return whether transformers checkpoints a module the re-entrant way; None: not at all.

    The function that it checkpoints with has no public name.
    """
    function = getattr(module, "_gradient_checkpointing_func", None)
    if function is None or not getattr(module, "gradient_checkpointing", False):
        return None
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


IGNORE_INDEX = -100


def next_token_labels(batch: Mapping[str, Any]) -> torch.Tensor:
    """Choose the labels of a batch for next-token prediction: ``batch["labels"]``, else the input ids.

    A token is predicted from the one before it, so both must be real: padding is never predicted, nor is the first
    token after it, whoever made the labels. Nor is the first token of a text in a packed row: where ``position_ids``
    begin again at 0, ``cu_seq_lens_q`` says so, or an attention mask of pairs hides the token before it.

    Args:
        batch: "input_ids" of shape (B, T); "labels" of the same, not shifted; a mask (see
            `lightning_prune.pruning.batches.padding_mask`).

    Returns:
        Labels (B, T), not shifted, `IGNORE_INDEX` where nothing is predicted.

    Raises:
        ValueError: the mask has another shape than the labels.
    """
    labels: torch.Tensor = batch["input_ids"] if batch.get("labels") is None else batch["labels"]
    real = padding_mask(batch)
    if real is not None:
        if real.shape != labels.shape:
            raise ValueError(
                f"the attention mask has shape {tuple(real.shape)}, the labels {tuple(labels.shape)}; give both one "
                "number for each token (samples, tokens)"
            )
        predicted = real.clone()
        predicted[:, 1:] &= real[:, :-1]
        labels = labels.masked_fill(~predicted.to(labels.device), IGNORE_INDEX)
    for starts in _text_starts(batch, labels):
        labels = labels.masked_fill(starts.to(labels.device), IGNORE_INDEX)
    return labels


def _text_starts(batch: Mapping[str, Any], labels: torch.Tensor) -> Iterator[torch.Tensor]:
    """Where texts of packed rows begin, in shapes that fit the labels (B, T), from each part that says so."""
    places, ends = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(places, torch.Tensor) and places.shape in (labels.shape, (1, labels.shape[1])):
        if bool(places.any()):
            yield places == 0
    elif isinstance(ends, torch.Tensor):
        starts = torch.zeros(1, labels.shape[1] + 1, dtype=torch.bool, device=ends.device)
        starts[:, ends.long()] = True
        yield starts[:, :-1]
    if (hidden := hides_previous(batch.get("attention_mask"), labels.shape)) is not None:
        yield hidden


def causal_lm_losses(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX, allow_empty: bool = False
) -> torch.Tensor:
    """Mean next-token cross-entropy of each sample.

    The shift is done here: the logits at position t are compared with the label at position t + 1; `labels`
    is `input_ids` with ignored positions replaced by `ignore_index`.

    Args:
        logits: Scores of shape (B, T, V), any floating dtype; the loss is computed in float32
            (float64 stays as it is).
        labels: Token ids of shape (B, T).
        ignore_index: Label that is not predicted (padding, prompts).
        allow_empty: Give samples without a label to predict a loss of NaN (and no gradient), in place of an error.

    Returns:
        Losses in nats per predicted token, of shape (B,).

    Raises:
        ValueError: If the shapes do not agree, or a sample has no label to predict.

    Examples:
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, 1, -100]])
        >>> [round(loss, 4) for loss in causal_lm_losses(logits, labels).tolist()]  # log(4)
        [1.3863, 1.3863]
    """
    losses = next_token_losses(logits, labels, ignore_index)  # [B, T - 1]
    if allow_empty:
        return _mean_losses(losses, labels, ignore_index)
    counts = (labels[:, 1:] != ignore_index).sum(dim=1)  # [B]
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"labels of sample(s) {empty} leave no token to predict: after the first position all are "
            f"{ignore_index} (ignore_index). Pass samples with at least two tokens that are not padding."
        )
    return losses.sum(dim=1) / counts


def _mean_losses(losses: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Means over the labels of each sample, ``[B]``; NaN of one without any."""
    counts = (labels[:, 1:] != ignore_index).sum(dim=1)  # [B]
    return (losses.sum(dim=1) / counts.clamp(min=1)).masked_fill(counts == 0, float("nan"))


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Cross-entropy of every next token.

    Args:
        logits: Scores of shape (B, T, V).
        labels: Token ids of shape (B, T), not shifted.
        ignore_index: Label that is not predicted.

    Returns:
        Losses in nats, of shape (B, T - 1), in float32 or wider; zero where the label is `ignore_index`.

    Raises:
        ValueError: If the shapes do not agree.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must have shape (B, T, V) and labels (B, T); received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}. Pass the labels unshifted, one for each position of the input."
        )
    targets = _next_targets(labels, ignore_index)
    return _cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index).view(targets.shape)[:, :-1]


def _next_targets(labels: Tensor, ignore_index: int) -> Tensor:
    # The labels are shifted, not the logits: a slice of them would be copied, forward and backward.
    targets = torch.full_like(labels, ignore_index)
    targets[:, :-1] = labels[:, 1:]
    return targets


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Of rows, ``[N, V]`` and ``[N]`` to ``[N]``."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # the sum over V loses too much in half precision
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


def without_label(batch: Any) -> bool:
    """Whether a batch holds labels and all are -100, or single tokens, so that no loss can be computed from it.

    The first position of a sequence does not count: a causal model predicts no token there.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] == 1:
        return True
    labels = [t for t in tensors_of(batch) if t.dim() > 0 and not t.is_floating_point() and t.dtype != torch.bool]
    return any(bool((t[:, 1:] if t.dim() > 1 and t.shape[1] > 1 else t).eq(IGNORE_INDEX).all()) for t in labels)
