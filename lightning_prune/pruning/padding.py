"""Which rows of a layer's input are padding: of the source, of the target, or of neither.

In an encoder-decoder the layers of the decoder see target tokens, but the keys and values of its cross-attention see
the encoder's output (or an image). Where the two are of one length only the tensor itself tells which it is.

A batch that does not name its padding (a tuple, two texts in one batch, a mask that the module computes) still has it:
it is what a transformers model inside is called with. So each such call has a padding of its own.

Letters: B samples, T tokens, I inputs of a layer.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune.pruning.attention_masks import real_positions
from lightning_prune.pruning.batches import named_mask, tensors_of, unless_all
from lightning_prune.pruning.experts import Routed
from lightning_prune.pruning.running import IGNORE_INDEX

# Images, video and sound that are padded; attention masks are read.
_OTHER_MASKS = re.compile(r"(pixel|feature|audio|video)\w*_mask$")


@dataclass
class Calls:
    """Calls of transformers models in the forward pass that runs, beside what the batch itself names.

    Attributes:
        running: The models that run, the innermost last.
        inside: Of the calls with a padding of their own that run, the innermost last.
        finished: Masks ``[B, T]`` of such calls that are over, each once.
        early: Layers that ran before any such call, and their rows ``[B, T, I]``.
        within: What holds in a call without a padding of its own.
        behind: What holds outside of all calls, until the next one ends.
    """

    running: list[nn.Module] = field(default_factory=list)
    inside: list[_Call] = field(default_factory=list)
    finished: list[Tensor] = field(default_factory=list)
    early: list[tuple[str, torch.Size]] = field(default_factory=list)
    within: Padding | None = None
    behind: Padding | None = None


@dataclass
class _Call:
    """A call of a transformers model that has a padding of its own.

    Attributes:
        model: The model.
        ids: Its token ids, if it was given any.
        padding: Of the call.
        masks: Of its source and its target, all real or not.
        returned: Of what it returns.
    """

    model: nn.Module
    ids: Tensor | None
    padding: Padding
    masks: list[Tensor]
    returned: Tensor | None


@dataclass
class Padding:
    """The padding of one batch or of one call, and where in the model it is found.

    Attributes:
        source: ``[B, T]`` bool, True where a token is real, or None where nothing is padded: of the encoder, or of a
            model that has none.
        target: The same of the decoder; None where there is none, or its length is not known.
        towers: Modules that see no tokens, such as those of an image encoder beside a language model.
        decoder: Modules that see target tokens.
        shorten: ``f(T', source)``, the mask of a source that the model has made shorter (all its convolutions over
            speech, with or without those of an adapter behind its layers).
        unplaced: Names of layers whose rows fit no mask, gathered over batches.
        memory: What cross-attention looks at in the forward pass that runs, and its mask; what calls returned, too.
        finished: Masks of calls that were over when a layer outside of all calls ran.
        calls: Those of the forward pass; None of a padding that does not change with them.
        readable: False where there is a mask from which padding cannot be read.
        strided: Masks of what convolutions over the source have made of it, the last of each length.
    """

    source: Tensor | None
    target: Tensor | None = None
    towers: frozenset[nn.Module] = frozenset()
    decoder: frozenset[nn.Module] = frozenset()
    shorten: tuple[Callable[[int, Tensor], Tensor], ...] = ()
    unplaced: dict[str, None] = field(default_factory=dict)
    memory: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    finished: tuple[Tensor, ...] = ()
    calls: Calls | None = None
    readable: bool = True
    strided: dict[int, Tensor] = field(default_factory=dict)

    @property
    def now(self) -> Padding:
        """What holds for a layer that is called at this moment, also when its backward pass comes later."""
        if self.calls is None:
            return self
        calls = self.calls
        if calls.inside:
            return calls.inside[-1].padding
        # The same object for all layers of a call: those that share an input share what it adds.
        if calls.running:
            calls.within = calls.within or replace(self, calls=None)
            return calls.within
        if calls.finished:
            calls.behind = calls.behind or replace(self, calls=None, finished=tuple(calls.finished))
            return calls.behind
        return self

    def keep(self, name: str, module: nn.Module, x: Tensor, rows: torch.Size) -> Tensor | None:
        """Find which rows of a layer's input are real.

        Args:
            name: Of the layer, for the warning.
            module: The layer.
            x: Its input.
            rows: ``[B, T, I]``, as which its rows are counted.

        Returns:
            A mask with one value a row, or None: all of them.
        """
        if module in self.towers:
            return None
        if not self.readable:
            self.unplaced[name] = None
            return None
        source, target = self.source, self.target
        remembered, mask = self._memory_mask(x)
        if not remembered:
            mask = target if module in self.decoder else source
            # Where a tensor has lost its storage (offloaded), its length may still tell.
            if source is not None and target is not None and rows[:2] == source.shape != target.shape:
                mask = source
            if self.finished:
                masks = [m for m in (*self.finished, *([] if mask is None else [mask])) if _has_rows(m, rows)]
                if any(not _equal(masks[0], m) for m in masks[1:]):
                    self.unplaced[name] = None
                    return None
                padded = [m for m in self.finished if rows[1] > 1 and not bool(m.all())]
                mask = next(iter([*masks, *([] if mask is None else [mask]), *padded]), None)
        if mask is None:
            if self.calls is not None and not remembered:
                self.calls.early.append((name, rows))
                # In backward, the calls that followed are known.
                if any(_has_rows(m, rows) and not bool(m.all()) for m in self.calls.finished):
                    self.unplaced[name] = None
            return None
        samples, tokens = mask.shape
        if rows[:2] in (mask.shape, (samples * tokens, 1), (1, samples * tokens)):
            return mask.to(x.device)
        if rows[:2] == (tokens, samples):  # time first
            return mask.t().to(x.device)
        if rows[:2] == (samples, 1):  # a pooler, a classifier
            return None
        # First: of a sample too short for any row the model's own mask has all.
        if mask is source and (strided := self.strided.get(rows[1])) is not None and rows[:2] == strided.shape:
            return strided.to(x.device)
        if rows[0] == samples and rows[1] < tokens and _at_the_end(mask):
            for shorten in self.shorten:
                if (short := _shortened(shorten, rows[1], mask)) is not None:
                    return short.to(x.device)
        self.unplaced[name] = None
        return None

    def stride(self, layer: nn.Conv1d, x: Tensor) -> None:
        """Note the mask of what a convolution makes of the source, or of what others have made of it."""
        source, length = self.source, x.shape[-1]
        before = source if source is not None and source.shape[1] == length else self.strided.get(length)
        if before is not None and (after := _strided(layer, before)) is not None:
            self.strided[after.shape[1]] = after

    def keep_routed(self, name: str, experts: nn.Module, routed: Routed) -> Tensor | None:
        """Find which of the tokens that one expert sees are real, ``[1, R]``; None: all of them.

        Args:
            name: Of the expert's matrix, for the warning.
            experts: The module that holds all experts.
            routed: The tokens.
        """
        if not self.readable:
            self.unplaced[name] = None
        mask = None if experts in self.towers else self.target if experts in self.decoder else self.source
        keep = None if mask is None else routed.keep(mask)
        if mask is not None and keep is None:
            self.unplaced[name] = None
        return keep

    def _memory_mask(self, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether a layer's input is what cross-attention looks at, and its mask."""
        if not self.memory:
            return False, None
        storage = x.untyped_storage().data_ptr()
        found = [mask for memory, mask in self.memory if memory.untyped_storage().data_ptr() == storage]
        return bool(found), next((mask for mask in found if mask is not None), None)


class PaddingFinder:
    """Finds the padding of batches in a model's layers.

    Args:
        model: The model that runs, whatever it is wrapped in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.unplaced: dict[str, None] = {}
        self.told: set[str] = set()
        self.unread: dict[str, None] = {}  # names of masks of other things than tokens, in which something is padded
        self.named = False  # whether the batch says what is padding
        self.batch: Any
        self.base: Padding | None
        self.calls: Calls
        self.memory: list[tuple[Tensor, Tensor | None]]
        self.rest()
        self.parts = [m for m in model.modules() if _is_model(m)]
        self.arguments = {m: list(inspect.signature(type(m).forward).parameters)[1:] for m in self.parts}
        self.pairs = list(_encoder_decoders(model))
        self.decoder = frozenset(m for _, _, part in self.pairs for m in part)
        self.towers = frozenset(_towers(model))
        self.shorten = _shorteners(model)
        self.convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d) and m not in self.decoder]

    def find(self, batch: Any) -> Padding | None:
        """The padding of a batch whose forward pass is next; None where nothing can be padded.

        Raises:
            ValueError: a mask from which padding cannot be read.
        """
        self.rest()
        self.batch, mask = batch, named_mask(batch)
        for name, value in batch.items() if isinstance(batch, Mapping) else ():
            if _OTHER_MASKS.search(str(name)) and isinstance(value, Tensor) and name not in self.unread:
                self.unread |= {} if unless_all(value.bool()) is None else {name: None}
        self.named, source = mask is not None, unless_all(mask)
        target = _target_mask(batch, source) if self.decoder and isinstance(batch, Mapping) else None
        if source is None:
            target = unless_all(target)
        if self.parts or source is not None:
            self.base = self._padding(source, target, self.calls if self.parts else None)
        return self.base

    def rest(self) -> None:
        """Let go of the pass that has run, and look at no other before the next batch."""
        self.batch, self.base, self.calls, self.memory = None, None, Calls(), []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See, while the block runs, what models are called with, and what encoders give their decoders."""

        def encoded(_: nn.Module, __: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            if isinstance(first, Tensor) and self.base is not None:
                self.memory.append((first.detach(), self.base.now.source))

        def received(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("encoder_attention_mask")
            if isinstance(states := kwargs.get("encoder_hidden_states"), Tensor) and self.base is not None:
                fits = isinstance(mask, Tensor) and mask.shape == states.shape[:2]
                self.memory.append((states.detach(), mask.bool() if isinstance(mask, Tensor) and fits else None))

        def strided(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if self.base is not None and args:
                self.base.now.stride(cast(nn.Conv1d, layer), args[0])

        handles = [layer.register_forward_pre_hook(strided, prepend=True) for layer in self.convolutions]
        handles += [encoder.register_forward_hook(encoded) for encoder, _, _ in self.pairs]
        handles += [part.register_forward_pre_hook(received, with_kwargs=True) for part in self.parts]
        handles += [part.register_forward_pre_hook(self._enter, with_kwargs=True) for part in self.parts]
        handles += [part.register_forward_hook(self._leave, always_call=True) for part in self.parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.memory = []

    def _padding(self, source: Tensor | None, target: Tensor | None, calls: Calls | None = None) -> Padding:
        rest = self.towers, self.decoder, self.shorten, self.unplaced, self.memory
        return Padding(source, target, *rest, calls=calls)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a call of a model; it has a padding of its own unless that of other token ids around it is known."""
        if self.base is None:
            return
        self.calls.running.append(model)
        given = {**dict(zip(self.arguments[model], args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if self.named or self.calls.inside:
            around = self.calls.inside[-1].ids if self.calls.inside else self.batch.get("input_ids")
            # A decoder's ids are others, but what is around it has a mask for them.
            inner = any(part in self.calls.running for _, part, _ in self.pairs)
            known = not inner and isinstance(ids, Tensor) and isinstance(around, Tensor)
            # The same object is told without waiting for a device.
            if not known or ids is around or _equal(cast(Tensor, ids).flatten(), cast(Tensor, around).flatten()):
                return
        if (call := self._call(model, given)) is None:
            return
        self.calls.inside.append(call)
        for name, rows in self.calls.early:
            if any(_has_rows(mask, rows) and not bool(mask.all()) for mask in call.masks):
                self.unplaced[name] = None

    def _call(self, model: nn.Module, given: dict[str, Any]) -> _Call | None:
        """A call of a model with the padding that its arguments name; None where they name none."""
        ids, made = given.get("input_ids"), given.get("decoder_input_ids")
        labels = self.batch.get("labels") if isinstance(self.batch, Mapping) else None
        if isinstance(labels, Tensor) and isinstance(made, Tensor) and labels.shape == made.shape:
            given = {"labels": labels, **given}  # of which the module has made the decoder's inputs
        try:
            mask = named_mask(given)
            source = unless_all(mask)
            target = _target_mask(given, source) if model in self.decoder else None
        except ValueError:
            return _Call(model, ids, replace(self._padding(None, None), readable=False), [], None)
        if mask is None and unless_all(target) is None:
            return None
        padding = self._padding(source, target if source is not None else unless_all(target))
        masks = [m for m in (mask, target) if m is not None]
        return _Call(model, ids, padding, masks, mask if target is None else target)

    def _leave(self, model: nn.Module, _: Any, output: Any) -> None:
        """End a call of a model; what it returns has its padding, wherever it goes."""
        calls = self.calls
        if model in calls.running:
            while calls.running.pop() is not model:  # one inside failed
                pass
        if calls.inside and calls.inside[-1].model is model:
            call = calls.inside.pop()
            calls.behind = None
            calls.finished += [m for m in call.masks if not any(_equal(m, known) for known in calls.finished)]
            self._remember(output, call.returned)
        elif self.base is not None and not calls.running and self.base.source is self.base.target is None:
            self._remember(output, None)

    def _remember(self, output: Any, mask: Tensor | None) -> None:
        """Note what a call has returned, and its mask (None: all real); but no logits, which are large."""
        known = {memory.untyped_storage().data_ptr() for memory, _ in self.memory}  # what an encoder gave
        parts = {k: v for k, v in output.items() if k != "logits"} if isinstance(output, Mapping) else output
        for made in tensors_of(parts):
            fits = made.dim() == 3 and (mask is None or made.shape[:2] == mask.shape)
            if fits and made.untyped_storage().data_ptr() not in known:
                self.memory.append((made.detach(), unless_all(mask)))

    def warn(self) -> None:
        """Name the layers in which padding was not found, and masks that are not read, once."""
        if names := [name for name in self.unread if name not in self.told]:
            warnings.warn(
                f"the batches hold padding by {', '.join(map(repr, names))}, which is not read: what is padded counts "
                "as if it were real. Give samples of one size where that matters",
                stacklevel=3,
            )
            self.told.update(names)
        if names := [name for name in self.unplaced if name not in self.told]:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            warnings.warn(
                f"the padding of the batches cannot be found in the inputs of {', '.join(map(repr, names[:4]))}{more}, "
                "whose rows are not those of the attention mask, or of several: all their rows were counted",
                stacklevel=3,
            )
            self.told.update(names)


def _shorteners(model: nn.Module) -> tuple[Callable[[int, Tensor], Tensor], ...]:
    found = (getattr(module, "_get_feature_vector_attention_mask", None) for module in model.modules())
    whole = next((function for function in found if function is not None), None)
    if whole is None:
        return ()
    adapts = "add_adapter" in inspect.signature(whole).parameters
    return (partial(whole, add_adapter=False), whole) if adapts else (whole,)


def _shortened(shorten: Callable[[int, Tensor], Tensor], length: int, mask: Tensor) -> Tensor | None:
    """The mask of rows of a length, if a text without padding has as many: the first convolutions have more rows."""
    longest = shorten(mask.shape[1], torch.ones_like(mask)).sum(1)
    return shorten(length, mask).bool() if bool((longest == length).all()) else None


def _strided(layer: nn.Conv1d, mask: Tensor) -> Tensor | None:
    """The mask of a convolution's rows, as many as each sample has without padding; None where that is not behind."""
    lengths = mask.sum(1, keepdim=True)
    if isinstance(layer.padding, str) or not _at_the_end(mask):
        return None
    least = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1 - 2 * layer.padding[0]
    rows = (mask.shape[1] - least) // layer.stride[0] + 1
    return torch.arange(max(rows, 0), device=mask.device) < (lengths - least) // layer.stride[0] + 1


def _at_the_end(mask: Tensor) -> bool:
    """Whether all that is padded is at the end, where the masks of fewer rows have it too."""
    return _equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool((one == other.to(one.device)).all()))


def _has_rows(mask: Tensor, rows: torch.Size) -> bool:
    """Whether rows ``[B, T, I]`` can be those of a mask, in any layout that is known."""
    samples, tokens = mask.shape
    return rows[:2] in (mask.shape, (samples * tokens, 1), (1, samples * tokens), (tokens, samples))


def _target_mask(batch: Mapping[str, Any], source: Tensor | None) -> Tensor | None:
    """Real positions of a decoder, ``[B, T]``: its mask, else up to the last label, else all; None if unknown.

    A sample that is not padded ends with its last label, and the decoder's inputs with it (they are one step behind).
    """
    ids, embedded = batch.get("decoder_input_ids"), batch.get("decoder_inputs_embeds")
    given = ids if isinstance(ids, Tensor) else embedded
    shape = given.shape[:2] if isinstance(given, Tensor) else None
    if batch.get("decoder_attention_mask") is not None:
        return real_positions(batch["decoder_attention_mask"], shape)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return (labels != IGNORE_INDEX).flip(1).cumsum(1).flip(1) > 0
    if isinstance(given, Tensor):
        return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    return source  # of which the model makes the decoder's inputs


def _encoder_decoders(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, set[nn.Module]]]:
    """Encoder and decoder of each encoder-decoder of transformers inside a model, and what sees the target's tokens."""
    seen: set[nn.Module] = set()
    for module in model.modules():
        if module in seen or not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            continue
        parts = [getattr(module, name, None) for name in ("get_encoder", "get_decoder")]
        encoder, decoder = (part() if callable(part) else None for part in parts)
        inside = set(module.modules())
        if not (isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)) or module in (encoder, decoder):
            continue
        if {encoder, decoder} <= inside and encoder not in set(decoder.modules()):
            seen |= inside
            yield encoder, decoder, inside - set(encoder.modules())


def _towers(module: nn.Module, inside: bool = False, tower: bool = False) -> Iterator[nn.Module]:
    """Modules of image encoders that are models of their own inside a model of transformers."""
    if _is_model(module):
        inside, tower = True, inside and getattr(type(module), "main_input_name", "") == "pixel_values"
    if tower:
        yield module
    for child in module.children():
        yield from _towers(child, inside, tower)


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, not a wrapper that hands out what the model inside it has."""
    return isinstance(getattr(type(module), "main_input_name", None), str)
