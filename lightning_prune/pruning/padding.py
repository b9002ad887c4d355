"""Which rows of a layer's input are padding: of the source, of the target, or of neither.

In an encoder-decoder the layers of the decoder see target tokens, but the keys and values of its cross-attention see
the encoder's output (or an image). Where the two are of one length only the tensor itself tells which it is.

Letters: B samples, T tokens, I inputs of a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.pruning.attention_masks import real_positions
from lightning_prune.pruning.batches import padding_mask
from lightning_prune.pruning.experts import Routed
from lightning_prune.pruning.running import IGNORE_INDEX


@dataclass
class Padding:
    """The padding of one batch, and where in the model it is found.

    Attributes:
        source: ``[B, T]`` bool, True where a token is real, or None where nothing is padded: of the encoder, or of a
            model that has none.
        target: The same of the decoder; None where there is none, or its length is not known.
        towers: Modules that see no tokens, such as those of an image encoder beside a language model.
        decoder: Modules that see target tokens.
        shorten: ``f(T', source)``, the mask of a source that the model has made shorter (convolutions over speech).
        unplaced: Names of layers whose rows fit no mask, gathered over batches.
        memory: What cross-attention looks at in the forward pass that runs, and its mask.
    """

    source: Tensor | None
    target: Tensor | None = None
    towers: frozenset[nn.Module] = frozenset()
    decoder: frozenset[nn.Module] = frozenset()
    shorten: Callable[[int, Tensor], Tensor] | None = None
    unplaced: dict[str, None] = field(default_factory=dict)
    memory: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

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
        source, target = self.source, self.target
        remembered, mask = self._memory_mask(x)
        if not remembered:
            mask = target if module in self.decoder else source
            # Where a tensor has lost its storage (offloaded), its length may still tell.
            if source is not None and target is not None and rows[:2] == source.shape != target.shape:
                mask = source
        if mask is None:
            return None
        samples, tokens = mask.shape
        if rows[:2] in (mask.shape, (samples * tokens, 1), (1, samples * tokens)):
            return mask.to(x.device)
        if rows[:2] == (tokens, samples):  # time first
            return mask.t().to(x.device)
        if rows[:2] == (samples, 1):  # a pooler, a classifier
            return None
        if self.shorten is not None and rows[0] == samples and rows[1] < tokens:
            short = self.shorten(rows[1], mask)
            if short.shape == rows[:2]:
                return short.bool().to(x.device)
        self.unplaced[name] = None
        return None

    def keep_routed(self, name: str, experts: nn.Module, routed: Routed) -> Tensor | None:
        """Find which of the tokens that one expert sees are real, ``[1, R]``; None: all of them.

        Args:
            name: Of the expert's matrix, for the warning.
            experts: The module that holds all experts.
            routed: The tokens.
        """
        mask = None if experts in self.towers else self.target if experts in self.decoder else self.source
        keep = None if mask is None else routed.keep(mask)
        if mask is not None and keep is None:
            self.unplaced[name] = None
        return keep

    def _memory_mask(self, x: Tensor) -> tuple[bool, Tensor | None]:
        """Whether a layer's input is what cross-attention looks at, and its mask."""
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
        self.source: Tensor | None = None
        self.memory: list[tuple[Tensor, Tensor | None]] = []
        self.parts = [m for m in model.modules() if _is_model(m)]
        self.pairs = list(_encoder_decoders(model))
        self.decoder = frozenset(m for _, _, part in self.pairs for m in part)
        self.towers = frozenset(_towers(model))
        self.shorten: Callable[[int, Tensor], Tensor] | None = next(
            (f for m in model.modules() if (f := getattr(m, "_get_feature_vector_attention_mask", None)) is not None),
            None,
        )

    def find(self, batch: Any) -> Padding | None:
        """The padding of a batch whose forward pass is next; None where nothing is padded.

        Raises:
            ValueError: a mask from which padding cannot be read.
        """
        self.memory = []
        self.source = source = padding_mask(batch)
        target = _target_mask(batch, source) if self.decoder and isinstance(batch, Mapping) else None
        if source is None and (target is None or bool(target.all())):
            return None
        return Padding(source, target, self.towers, self.decoder, self.shorten, self.unplaced, self.memory)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See, while the block runs, what encoders give their decoders."""

        def encoded(_: nn.Module, __: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            if isinstance(first, Tensor):
                self.memory.append((first.detach(), self.source))

        def received(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("encoder_attention_mask")
            if isinstance(states := kwargs.get("encoder_hidden_states"), Tensor):
                fits = isinstance(mask, Tensor) and mask.shape == states.shape[:2]
                self.memory.append((states.detach(), mask.bool() if isinstance(mask, Tensor) and fits else None))

        handles = [encoder.register_forward_hook(encoded) for encoder, _, _ in self.pairs]
        handles += [part.register_forward_pre_hook(received, with_kwargs=True) for part in self.parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.memory = []

    def warn(self) -> None:
        """Name the layers in which padding was not found, once."""
        if self.unplaced:
            names = list(self.unplaced)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            warnings.warn(
                f"the padding of the batches cannot be found in the inputs of {', '.join(map(repr, names[:4]))}{more}, "
                "whose rows are not those of the attention mask: all their rows were counted",
                stacklevel=3,
            )
            self.unplaced.clear()


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
