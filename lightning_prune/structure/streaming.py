"""Sum up statistics of layers over the training's own passes, one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.pruning.hooks import on_gradient
from lightning_prune.pruning.layer_kinds import layer_kind
from lightning_prune.pruning.padding import Padding
from lightning_prune.pruning.statistics import BACKWARD_STATISTICS, Accumulator, wide_dtype
from lightning_prune.structure.units import Structure


class StreamedStatistics:
    """Hooks on layers, and the sums of the optimizer step that is running.

    Somebody has to say which passes are those of training (`listening`), since gradient checkpointing repeats them.
    Where weights are sharded, passes see them whole, and every rank takes what its own samples give.

    Args:
        structure: Of the model.
        wanted: What to collect of each layer, by its name.

    Attributes:
        listening: Whether passes are observed now.
        padding: Of the batch whose passes are observed; None where nothing is padded.
        masked: Inputs that count as zero though they are not, by layer.
        tokens: Tokens that each layer has seen in this step.
        without_gradient: Names of layers that ran in this step while no gradient was recorded, though one was wanted.
    """

    def __init__(self, structure: Structure, wanted: Mapping[str, frozenset[str]]) -> None:
        self.listening = False
        self.padding: Padding | None = None
        self.masked: Mapping[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.follow(structure, wanted)

    def follow(self, structure: Structure, wanted: Mapping[str, frozenset[str]]) -> None:
        """Begin anew with layers that have other names or sizes now; hooks that are on move to them."""
        modules = structure.modules()
        self._layers = {name: (modules[name], statistics) for name, statistics in wanted.items()}
        self.take()
        if self._handles:
            self.watch()

    def watch(self) -> None:
        """Put hooks on the layers."""
        self.release()
        for name, (layer, statistics) in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name, statistics)))

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> dict[str, Accumulator]:
        """Return the sums of the step by layer, those of layers that were seen, and begin the next step."""
        taken: dict[str, Accumulator] = getattr(self, "_sums", {})
        for sums in taken.values():
            sums.settle()
        self._sums: dict[str, Accumulator] = {}
        self.tokens: dict[str, int] = {}
        self.without_gradient: set[str] = set()
        return taken

    def _hook(self, name: str, statistics: frozenset[str]) -> Any:
        def take(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            backward = bool(statistics & BACKWARD_STATISTICS)
            if not self.listening:
                return
            if backward and not output.requires_grad:
                self.without_gradient.add(name)
                return
            kind, sums = layer_kind(layer), self._of(name, layer, statistics)
            assert kind is not None
            x = args[0].detach()
            masked = self.masked.get(name)
            counted = x if masked is None else x.index_fill(-1, masked.to(x.device), 0.0)
            rows = kind.input_rows(layer, counted)  # [B, T, I]
            real = None if self.padding is None else self.padding.now.keep(name, layer, x, rows.shape)
            sums.add(sums.input_increments(rows, real))
            seen = rows.shape[:2].numel() if real is None else int(real.sum())
            self.tokens[name] = self.tokens.get(name, 0) + seen
            if backward:
                on_gradient(output, lambda delta: sums.add_output_gradient(delta, 1.0))

        return take

    def _of(self, name: str, layer: nn.Module, statistics: frozenset[str]) -> Accumulator:
        if name not in self._sums:
            weight: Any = layer.weight
            self._sums[name] = Accumulator(statistics, tuple(weight.shape), dtype=wide_dtype(weight.dtype))
        return self._sums[name]
