"""Distill: let a training step add to its loss what keeps it close to the logits of a dense source model.

Letters: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.structure.units import find_language_model


def logits_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ``temperature^2 * KL(teacher || student)``.

    Hinton et al. 2015, arXiv 1503.02531, section 2. Both distributions are softened by the temperature; its square
    keeps the gradient's size. Computed in float32, or wider where the logits are.

    Args:
        student: Logits ``[B, T, V]``; the gradient goes here.
        teacher: Logits ``[B, T, V]``.
        temperature: Above 0.
        keep: Bool ``[B, T]``, True where a token counts; default all.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: the shapes do not agree.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits {tuple(student.shape)} and the source's {tuple(teacher.shape)} differ; distill from "
            "a model with the same vocabulary, or the same classes"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student.to(wide) / temperature, dim=-1)
    log_p = torch.log_softmax(teacher.to(wide) / temperature, dim=-1)
    divergences = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)  # [B, T]
    if keep is None:
        return divergences.mean() * temperature**2
    kept = keep.to(divergences.dtype)
    return (divergences * kept).sum() / kept.sum().clamp(min=1) * temperature**2


_OF = "_lightning_prune_distillation"


class Distillation:
    """Adds the divergence from a source model to a module's training loss: ``(1 - weight) * loss + weight * KL``.

    While it is on, the module's ``training_step`` is wrapped: the inputs and logits of the student's forward passes
    inside it are noted, and the source runs on the same inputs, without gradients, in evaluation mode. The source is
    no part of the module, so neither checkpoints nor optimizers see it. What the module itself logs stays its own loss.

    Nothing of it is in checkpoints, so a resumed fit distills as the fit before did. Under FSDP2 every rank holds the
    whole source.

    Args:
        source: A transformers model that gives logits of the same shape for the same arguments, or where to load a
            causal language model from (folder, hub id, ``.gguf`` file).
        weight: Share of the divergence in the loss, above 0 and at most 1.
        temperature: See `logits_divergence`.

    Attributes:
        last: Divergence of the latest training step; None before one.

    Raises:
        ValueError: `weight` or `temperature` out of range.
    """

    def __init__(self, source: str | nn.Module, weight: float = 0.5, temperature: float = 1.0) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"distill_weight={weight!r} must be above 0 and at most 1")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r} must be above 0")
        self.source = source
        self.weight = weight
        self.temperature = temperature
        self.last: Tensor | None = None
        self._passes: list[tuple[Mapping[str, Any], Tensor]] = []
        self._undo: list[Callable[[], None]] = []
        self._paused = False

    @classmethod
    def of(cls, source: str | nn.Module | None, weight: float, temperature: float) -> Distillation | None:
        """Return the distillation that a callback's arguments ask for, or None without a source."""
        return None if source is None else cls(source, weight, temperature)

    def load(self, module: L.LightningModule) -> None:
        """Load the source, and check it against the language model in a module.

        Raises:
            ValueError: manual optimization; another vocabulary; the very model that is trained.
        """
        from lightning_prune.checkpoints.sources import load_pretrained

        if not module.automatic_optimization:
            raise ValueError(
                f"distill_from adds to the loss that training_step returns, which {type(module).__name__} does not "
                "train on (manual optimization): use automatic optimization, or add "
                "lightning_prune.callbacks.distillation.logits_divergence to the loss yourself"
            )
        _, student = find_language_model(module)
        source: nn.Module = self.source if isinstance(self.source, nn.Module) else load_pretrained(self.source)
        self.source = source
        mine, theirs = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (student, source))
        if mine != theirs:
            raise ValueError(
                f"distill_from: the source has a vocabulary of {theirs}, the model one of {mine}; use the model it "
                "began as"
            )
        trained = set(student.parameters())
        if any(parameter in trained for parameter in source.parameters()):
            raise ValueError(
                "distill_from is the model that is trained: pass a copy of it (copy.deepcopy), or where to load it"
            )

    def begin(self, module: L.LightningModule, student: nn.Module | None = None) -> None:
        """Wrap the module's training step until `end`.

        Args:
            module: The module.
            student: What its step calls; default its language model.
        """
        assert isinstance(self.source, nn.Module)
        self.end()
        self.source.requires_grad_(False).eval().to(module.device)
        student = find_language_model(module)[1] if student is None else student
        original = module.training_step
        listening = False

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if listening:
                if not isinstance(getattr(output, "logits", None), Tensor):
                    raise ValueError(
                        f"distill_from compares logits, and {type(student).__name__} returned a "
                        f"{type(output).__name__} without them: leave distill_from out, or return_dict=False"
                    )
                self._passes.append((_inputs(student, self.source, args, kwargs), output.logits))

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal listening
            if self._paused:
                return original(*args, **kwargs)
            self._passes, listening = [], True
            try:
                output = original(*args, **kwargs)
            finally:
                listening = False
            return self._with_divergence(output)

        handle = student.register_forward_hook(note, with_kwargs=True)
        vars(training_step)[_OF] = self
        module.__dict__["training_step"] = training_step
        self._undo = [handle.remove, lambda: module.__dict__.pop("training_step", None)]

    def end(self) -> None:
        """Give the module its training step back."""
        for undo in self._undo:
            undo()
        self._undo, self._passes = [], []

    def log(self, module: L.LightningModule) -> None:
        """Show the latest divergence in the progress bar; call it at the end of a batch."""
        if self.last is not None:
            module.log("distillation", self.last, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def _with_divergence(self, output: Any) -> Any:
        loss = output["loss"] if isinstance(output, Mapping) else output
        passes, self._passes = self._passes, []
        if loss is None:
            return None
        if not passes:
            raise ValueError(
                "distill_from: training_step did not call the language model, so there are no logits to compare; name "
                "the attribute that it calls (attribute=...)"
            )
        total = torch.zeros((), device=loss.device)
        for inputs, logits in passes:
            with torch.no_grad():
                theirs = self.source(**inputs).logits  # type: ignore[operator]
            keep = _counting(inputs, logits)
            total = total + logits_divergence(logits, theirs, self.temperature, keep) / len(passes)
        self.last = total.detach()
        mixed = (1 - self.weight) * loss + self.weight * total
        return {**output, "loss": mixed} if isinstance(output, Mapping) else mixed


@contextmanager
def undistilled(module: L.LightningModule) -> Iterator[None]:
    """Let a module's training step return its own loss, by which weights are scored, whichever callback distills."""
    found = getattr(module.training_step, _OF, None)
    if found is None:
        yield
        return
    found._paused = True
    try:
        yield
    finally:
        found._paused = False


# Of the student's arguments: a cache of its own, and outputs that nobody asks the source for.
_LEFT_OUT = ("past_key_values", "cache", "return_dict", "output_hidden_states", "output_attentions")


def _inputs(student: nn.Module, source: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the source is to be called with: the student's arguments, by name.

    Raises:
        ValueError: the student was given embeddings, which are its own.
    """
    # Of the source's own forward: PEFT's, which may be around the student, names none.
    parameters = inspect.signature(source.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] or ["input_ids"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("inputs_embeds") is not None:
        raise ValueError(
            f"distill_from: training_step calls {type(student).__name__} with inputs_embeds, which are of its own "
            "embeddings and mean nothing to the source: call it with input_ids"
        )
    inputs = {name: value for name, value in given.items() if name not in _LEFT_OUT}
    if not getattr(getattr(student, "config", None), "is_encoder_decoder", False):  # whose decoder reads them
        inputs.pop("labels", None)  # they would make the source compute a loss
    return {**inputs, "use_cache": False} if "use_cache" in names else inputs


def _counting(inputs: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """Which positions of logits ``[B, T, V]`` count, bool ``[B, T]``; None: all, as of the logits of whole samples."""
    if logits.dim() != 3:
        return None
    labels = inputs.get("labels")
    if isinstance(labels, Tensor):  # an encoder's padding is that of other positions
        return labels != -100
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    return mask.bool()[:, -logits.shape[1] :] if isinstance(mask, Tensor) and mask.dim() == 2 else None
