"""kfac saliency of units from the training's own passes: squares of layer inputs and of output gradients.

Dimensions: N tokens, I inputs and O outputs of a layer, P places, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.statistics import LayerStatistics
from lightning_prune.structure.saliency import SaliencyAccumulator, kfac_saliency, reader_targets
from lightning_prune.structure.units import Removal, Structure
from lightning_prune.taps import on_gradient


class StreamedKFAC(SaliencyAccumulator):
    """Sums of kfac saliency by unit, over training steps, with what `SaliencyAccumulator` offers.

    Of one step, ``sum over i of W_ij^2 E[delta_i^2] E[x_j^2]`` (see `kfac_saliency`) from the tokens of the step, with
    delta the gradient of the training loss. Hooks on the layers that read units take two vectors of each; they have to
    be told when a forward pass is one of training (`listening`), since gradient checkpointing repeats it. Where weights
    are sharded, passes see them whole, and every rank takes the squares of its own samples.

    Args:
        structure: Of the model.
        types: Unit types to score.
        reduce: Sums a tensor over processes that see different samples.
        decay: Share of all sums that a `reset` keeps.

    Attributes:
        listening: Whether forward passes are observed now.
        keep: Bool, one for each token of the batch, False where it is padding; None where nothing is.
    """

    def __init__(
        self,
        structure: Structure,
        types: Sequence[str],
        reduce: Callable[[Tensor], Tensor] | None = None,
        decay: float = 0.0,
    ) -> None:
        super().__init__(structure, types, decay=decay)
        self.kind = "kfac"
        self.listening = False
        self.keep: Tensor | None = None
        self._reduce = reduce
        self._handles: list[Any] = []

    def follow(self, structure: Structure, removal: Removal | None = None) -> None:
        """See `SaliencyAccumulator.follow`; the hooks move with the layers."""
        super().follow(structure, removal)
        self._targets = reader_targets(structure, self.types)
        self._squares = self._zeros()
        if getattr(self, "_handles", None):  # layers may have other numbers now
            self.watch()

    def _zeros(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of the running step by parameter name: ``[I]`` and ``[O]``."""
        found = {}
        for target in self._targets:
            outputs, inputs = target.shape  # of the whole weight, which passes see where it is sharded
            zeros = torch.zeros(inputs + outputs, dtype=self._dtype, device=target.weight.device)
            found[target.name] = (zeros[:inputs], zeros[inputs:])
        return found

    # -- watching ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Put hooks on the layers."""
        self.release()
        for target in self._targets:
            self._handles.append(target.module.register_forward_hook(self._hook(target.name)))

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def take(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not self.listening or not output.requires_grad:
                return
            inputs, outputs = self._squares[name]
            inputs += _squares(args[0].detach(), self.keep, self._dtype).to(inputs.device)

            def add(delta: Tensor) -> None:
                outputs.add_(_squares(delta, None, self._dtype).to(outputs.device))

            on_gradient(output, add)

        return take

    # -- a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self) -> None:
        """Take in the step whose passes were observed; one with NaN or infinity does not count."""
        squares, self._squares = self._squares, self._zeros()
        vectors = [vector for pair in squares.values() for vector in pair]
        flat = torch.cat(vectors)
        if self._reduce is not None:
            flat = self._reduce(flat)
        if not bool(torch.isfinite(flat).all()):
            return
        norms = iter(torch.split(flat.sqrt().float(), [len(vector) for vector in vectors]))
        statistics = {
            name: LayerStatistics(1, input_norm=next(norms), output_grad_norm=next(norms)) for name in squares
        }
        for unit_type, means in kfac_saliency(self.structure, statistics, self.types).items():
            sums = self._sums[unit_type]  # type: ignore[index]
            sums += (means * self.structure.unit_weights(unit_type)).to(sums)
        self._count_step()


def _squares(rows: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum of squares over tokens, ``[..., C]`` to ``[C]``."""
    flat = rows.reshape(-1, rows.shape[-1])
    if keep is not None and keep.numel() == len(flat):
        flat = flat[keep.reshape(-1)]
    wide = torch.promote_types(flat.dtype, torch.float32)
    return flat.to(wide).square().sum(0).to(dtype)
