"""Cut a decoder block into the windows that are fitted one after the other: the whole block, or its two halves.

The first half is attention with its norm and residual, the second the rest. Where one ends is seen, not named by a
family: the second half begins with the first module after attention whose input is neither the block's input nor what
a module before it gave out, that is, a new sum of both. Blocks whose attention and MLP run side by side have no such
place and stay whole.

Letters: B samples, T tokens, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.pruning.blocks import BlockBatch, BlockWalk, hidden_keyword


@dataclass(frozen=True)
class Window:
    """A block, or a half of it.

    Attributes:
        block: Clean name of the block.
        index: Its place in the walk.
        begin: Name of the block's child that the second half begins with; None for a first half and a whole block.
        end: Name of the child before which the first half ends; None for a second half and a whole block.
        parameters: Names in the block of the parameters that are the window's own.
    """

    block: str
    index: int
    begin: str | None
    end: str | None
    parameters: frozenset[str]

    @property
    def name(self) -> str:
        """Name of the block, with where the half begins or ends."""
        if self.end is not None:
            return f"{self.block} before {self.end}"
        return self.block if self.begin is None else f"{self.block} from {self.begin}"

    def run(
        self, walk: BlockWalk, batch: BlockBatch, hidden: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the hidden states ``[B, T, D]`` at the end of the window; its block begins with `hidden`.

        Args:
            walk: Has the block.
            batch: Whose masks and positions it receives.
            hidden: Input of the block, ``[B, T, D]``.
            weights: Parameters in place of the block's own, by their names in it.
        """
        if self.end is None:
            return walk.forward(self.index, batch, hidden, weights)

        def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = _input_of(args, kwargs)
            assert hidden is not None
            raise _ReachedError(hidden)

        handle = walk.blocks[self.index].get_submodule(self.end).register_forward_pre_hook(reached, with_kwargs=True)
        try:
            walk.forward(self.index, batch, hidden, weights)
        except _ReachedError as end:
            return end.hidden.reshape(hidden.shape)
        finally:
            handle.remove()
        raise RuntimeError(f"{self.block!r} did not run {self.end!r}, which it ran before")


class _ReachedError(Exception):
    """A half is done."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def cut(walk: BlockWalk, index: int, name: str, weights: Collection[str], halves: bool) -> list[Window]:
    """Return the windows of a block in the order they run.

    Args:
        walk: Has reached the block.
        index: The block.
        name: Its clean name.
        weights: Names in the block of the weights that can be pruned; a half has some of them.
        halves: Look for two halves.
    """
    block = walk.blocks[index]
    own = [parameter for parameter, _ in block.named_parameters()]
    order = _calls(walk, index) if halves else []
    second = _second_half(order, weights)
    if second is None:
        return [Window(name, index, None, None, frozenset(own))]
    first = {child for child, _ in order[:second]}
    before = frozenset(parameter for parameter in own if parameter.partition(".")[0] in first)
    middle = order[second][0]
    return [
        Window(name, index, None, middle, before),
        Window(name, index, middle, None, frozenset(own) - before),
    ]


@torch.no_grad()
def _calls(walk: BlockWalk, index: int) -> list[tuple[str, bool]]:
    """The block's children as the first batch runs them, and whether each is given a new tensor of hidden states."""
    block, batch = walk.blocks[index], walk.batches[0]
    order: list[tuple[str, bool]] = []
    known: list[Tensor] = []  # held, so that no memory is used twice

    def is_alike(tensor: Tensor) -> bool:  # some families put all tokens of a batch in one dimension
        return tensor.numel() == batch.hidden.numel() and tensor.shape[-1] == batch.hidden.shape[-1]

    def is_known(tensor: Tensor) -> bool:
        return any(tensor.data_ptr() == other.data_ptr() for other in known)

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _input_of(args, kwargs)
        assert hidden is not None
        known.append(hidden)

    def before(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = _input_of(args, kwargs)
            order.append((name, hidden is not None and is_alike(hidden) and not is_known(hidden)))

        return note

    def after(module: nn.Module, args: Any, output: Any) -> None:
        known.extend(t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor))

    handles = [block.register_forward_pre_hook(entered, with_kwargs=True)]
    for name, child in block.named_children():
        handles.append(child.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(child.register_forward_hook(after))
    try:
        walk.forward(index, batch, batch.hidden)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _second_half(order: list[tuple[str, bool]], weights: Collection[str]) -> int | None:
    """Place in the order of calls where the second half begins."""

    def has_weights(calls: list[tuple[str, bool]]) -> bool:
        return any(weight.startswith(f"{child}.") for child, _ in calls for weight in weights)

    names = [name for name, _ in order]
    for place, (name, new) in enumerate(order):
        if new and names.count(name) == 1 and has_weights(order[:place]) and has_weights(order[place:]):
            return place
    return None


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    hidden = args[0] if args else kwargs.get(hidden_keyword(kwargs))
    return hidden if isinstance(hidden, Tensor) else None
