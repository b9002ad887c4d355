"""What a pruning covers, and what it leaves out: shares, names and reasons, in one summary.

Countable weights are matrices outside embeddings and heads (`lightning_prune.naming.is_prunable`): the
denominator of every share of pruned weights that this package prints.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_prune.naming import clean_name, is_head, is_prunable, own_parameters
from lightning_prune.pruning.layer_kinds import embeds, packed_layers
from lightning_prune.pruning.offloading import at_hand
from lightning_prune.pruning.targets import (
    DEFAULT_IGNORE,
    HEAD,
    ROUTER,
    Selection,
    adapter_modules,
    is_router,
    select_layers,
)
from lightning_prune.sharding import local, type_name

ENOUGH = 0.9
"""Share of the countable weights that must be candidates; below it the summary is a warning."""

# Zeros that nobody has pruned: chance, rounding. More of them than this share may be a mask.
FEW_ZEROS = 0.01
_MOST_NAMES = 8


@dataclass(frozen=True)
class LeftOut:
    """Tensors of one name that are not pruned, for one reason.

    Attributes:
        name: Their name, with ``*`` for numbers: ``layers.*.mlp.experts.down_proj``; adapters have one together.
        tensors: How many.
        numel: Weights in them.
        reason: Why.
        countable: Whether they count as weights that a user would prune.
    """

    name: str
    tensors: int
    numel: int
    reason: str
    countable: bool


@dataclass(frozen=True)
class Coverage:
    """What of a model is pruned, and what is not.

    Attributes:
        parameters: Number of parameters, shared ones once.
        countable: Weights of matrices outside embeddings and heads.
        candidates: Weights of the layers that are pruned.
        counted: Those of them that are countable; not, say, a head that was named in `targets`.
        counted_names: Names of the parameters that `counted` sums over.
        uncounted: Names of matrices that are not countable, though in a file their names would not tell: embeddings
            under names of a user's own. `WeightPruning` writes them into checkpoints, for `inspect`.
        beside: Countable weights that another pruning of the same model takes.
        left_out: Matrices that are not pruned, the largest first.
        packed: Names and types of linear and convolution layers whose weights are no plain parameters, as quantizing
            packages have them: neither counted nor pruned.
        layers: Number of layers that are pruned.
        zeros_lost: Tensors with zeros that ``score="keep"`` cannot hold, with their number, the most first.
    """

    parameters: int
    countable: int
    candidates: int
    counted: int
    counted_names: frozenset[str] = field(repr=False, default=frozenset())
    uncounted: tuple[str, ...] = ()
    beside: int = 0
    left_out: tuple[LeftOut, ...] = ()
    packed: tuple[tuple[str, str], ...] = ()
    layers: int = 0
    zeros_lost: tuple[tuple[str, int], ...] = ()

    @property
    def share(self) -> float:
        """Share of the countable weights that are candidates; 1.0 where there are none."""
        return self.counted / self.countable if self.countable else 1.0

    @property
    def worrying(self) -> bool:
        """Whether so much is left out that it must be a warning."""
        share = self.share + self.beside / max(self.countable, 1)
        seen = self.layers / (self.layers + len(self.packed)) if self.packed else 1.0
        return min(share, seen) < ENOUGH or bool(self.zeros_lost)

    def pruned_shares(self, pruned: Mapping[str, int]) -> tuple[float, float]:
        """Shares of pruned weights, of the countable weights and of all parameters.

        Args:
            pruned: Number of pruned weights of each parameter.
        """
        counted = sum(count for name, count in pruned.items() if name in self.counted_names)
        everything = sum(pruned.values())
        return counted / self.countable if self.countable else 0.0, everything / max(self.parameters, 1)

    def __str__(self) -> str:
        """The summary."""
        text = (
            f"{self.candidates:,} weights are candidates: {self.share:.1%} of {self.countable:,} countable weights "
            f"(matrices outside embeddings and heads), {self.candidates / max(self.parameters, 1):.1%} of "
            f"{self.parameters:,} parameters"
        )
        if self.beside:
            text += f"\n  pruned by another callback: {self.beside:,} weights, {self.beside / self.countable:.1%}"
        inside = [entry for entry in self.left_out if entry.countable]
        outside = [entry for entry in self.left_out if not entry.countable]
        if inside:
            text += "\n  left out, not pruned (shares of the countable weights):" + _listed(inside, self.countable)
        if outside:
            text += "\n  not counted, not pruned (shares of all parameters):" + _listed(outside, self.parameters)
        if self.packed:
            names = list(dict.fromkeys(f"{_with_stars(name)} ({kind})" for name, kind in self.packed))
            text += (
                f"\n  neither counted nor pruned are {len(self.packed)} layers whose weights are no plain parameters "
                f"(quantized?): {', '.join(names[:_MOST_NAMES])}{', ...' if len(names) > _MOST_NAMES else ''}"
            )
        if self.zeros_lost:
            text += (
                f"\n  score='keep' cannot hold the zeros of {len(self.zeros_lost)} tensors that it leaves out; "
                "training will fill them, unless you freeze them:"
            )
            text += "".join(f"\n    {name}: {zeros:,} zeros" for name, zeros in self.zeros_lost[:_MOST_NAMES])
            more = len(self.zeros_lost) - _MOST_NAMES
            text += f"\n    and {more} tensors more" if more > 0 else ""
        return text


def _listed(entries: Sequence[LeftOut], whole: int) -> str:
    """Names, shares of `whole` and reasons."""
    shown = [
        f"{e.name} ({e.tensors} tensor{'s' if e.tensors > 1 else ''}, {e.numel / max(whole, 1):.1%}): {e.reason}"
        for e in entries[:_MOST_NAMES]
    ]
    rest = entries[_MOST_NAMES:]
    if rest:
        numel = sum(e.numel for e in rest)
        reasons = ", ".join(dict.fromkeys(e.reason for e in rest))
        shown.append(f"{sum(e.tensors for e in rest)} tensors more ({numel / max(whole, 1):.1%}): {reasons}")
    return "".join(f"\n    {line}" for line in shown)


def measure_coverage(
    model: nn.Module,
    targets: Sequence[str | type[nn.Module]] | None = None,
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE,
) -> Coverage:
    """Measure what `prune` would cover of a model, and what it would leave out.

    Args:
        model: Any module.
        targets: See `prune`.
        ignore: See `prune`.

    Raises:
        ValueError, TypeError: see `prune`.
    """
    return coverage_of(model, select_layers(model, targets, ignore, offloaded=True))


def coverage_of(
    model: nn.Module, selection: Selection, keeps_zeros: bool = False, beside: Collection[str] = ()
) -> Coverage:
    """What a selection of layers covers of a model. Of sharded parameters the whole counts, without other ranks.

    Args:
        model: The model.
        selection: From `select_layers`.
        keeps_zeros: Look for zeros outside the selection, for ``score="keep"``. Where parameters are sharded they are
            counted in this rank's parts.
        beside: Names of weights that another pruning takes; they are not left out.
    """
    candidates = {id(target.weight): target for target in selection.targets}
    parameters = countable = counted = taken = 0
    names: set[str] = set()
    uncounted: list[str] = []
    lost: dict[str, int] = {}
    groups: dict[tuple[str, str, bool], list[int]] = {}
    trains = any(parameter.requires_grad for parameter in model.parameters())
    for name, module, parameter in _parameters(model):
        size, counts = parameter.numel(), _counts(name, module, parameter, selection.adapters)
        parameters += size
        countable += size if counts else 0
        if not counts and is_prunable(name, parameter.shape, parameter.dtype):
            uncounted.append(name)
        if id(parameter) in candidates:
            if counts:
                counted += size
                names.add(candidates[id(parameter)].parameter)
        elif name in beside:
            taken += size if counts else 0
        elif parameter.dim() > 1 and size:
            reason = _reason(name, module, selection)
            # Each layer may have two adapters, whose names say nothing and would hide all others.
            shown = "what PEFT has added" if reason == "adapter" else _with_stars(name)
            groups.setdefault((shown, reason, counts), []).append(size)
            if keeps_zeros and reason != "adapter" and (parameter.requires_grad or not trains):
                with at_hand(module):
                    here = getattr(module, name.rpartition(".")[2], parameter)
                    zeros = pruned_zeros(here, whole_rows=reason != "embedding")
                lost |= {name: zeros} if zeros else {}
    return Coverage(
        parameters=parameters,
        countable=countable,
        candidates=sum(target.numel for target in selection.targets),
        counted=counted,
        counted_names=frozenset(names),
        uncounted=tuple(uncounted),
        beside=taken,
        left_out=tuple(
            sorted(
                (LeftOut(name, len(s), sum(s), reason, counts) for (name, reason, counts), s in groups.items()),
                key=lambda entry: -entry.numel,
            )
        ),
        packed=tuple(packed_layers(model)),
        layers=len(selection.targets),
        zeros_lost=tuple(sorted(lost.items(), key=lambda item: -item[1])),
    )


def countable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The countable weights of a model by clean name, each shared one once."""
    adapters = adapter_modules(model)
    return {n: p.detach() for n, module, p in _parameters(model) if _counts(n, module, p, adapters)}


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter once, by its clean name and with the module that holds it."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in own_parameters(module).items():
            if parameter not in seen:
                seen.add(parameter)
                if not isinstance(parameter, nn.parameter.UninitializedParameter):
                    yield clean_name(f"{prefix}.{name}" if prefix else name), module, parameter


def _counts(name: str, module: nn.Module, parameter: Tensor, adapters: Collection[nn.Module]) -> bool:
    """Whether a parameter is countable: by its name, as in files, and by what its module is."""
    return is_prunable(name, parameter.shape, parameter.dtype) and module not in adapters and not embeds(module)


def _reason(name: str, module: nn.Module, selection: Selection) -> str:
    """Why a matrix is not pruned."""
    kind, layer = type_name(module), name.removesuffix(".weight")
    if module in selection.adapters:
        return "adapter"
    if layer in selection.left_out:
        return selection.left_out[layer]
    if embeds(module):
        return "embedding"
    if is_head(name):
        return HEAD
    if "experts" in name.split(".") or "Experts" in kind:
        return f"experts as {kind} keeps them cannot be pruned"
    if is_router(module) and name.endswith(".weight"):
        return ROUTER
    if not is_prunable(name, (2, 2), torch.float32):
        return "embedding, position, norm or bias"
    if name.endswith((".weight", "original0", "original1")):
        return f"{kind} cannot be pruned"
    return f"parameter of {kind}, which is no layer"


def _with_stars(name: str) -> str:
    """A name with ``*`` for what numbers tell apart.

    >>> _with_stars("encoder.layers.11.mlp.fc1.weight"), _with_stars("lstm.weight_hh_l0_reverse")
    ('encoder.layers.*.mlp.fc1.weight', 'lstm.weight_hh_l*')
    """
    name = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
    return re.sub(r"_l\d+(_reverse)?$", "_l*", name)


@torch.no_grad()
def pruned_zeros(parameter: Tensor, whole_rows: bool) -> int:
    """Count zeros of a tensor that look pruned; 0 if it holds few, or nothing else. Whole rows may be padding."""
    zero = local(parameter.detach()) == 0
    zero = zero.reshape(zero.shape[:-1].numel(), zero.shape[-1])
    zeros = int((zero if whole_rows else zero[~zero.all(dim=1)]).count_nonzero())
    return zeros if FEW_ZEROS * zero.numel() < zeros < zero.numel() else 0
