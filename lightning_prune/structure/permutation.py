"""Put channels in an order in which N:M groups lose less, without changing what the model computes.

N:M keeps N of every M consecutive inputs, so it matters which inputs stand together: a group of four large weights
loses two of them. Three orders can be chosen freely, since whatever writes the channels can be put in the same order:
those of the FFN (rows of gate and up, columns of down), those of the values inside each key/value head (rows of v,
columns of o of every query head that it serves), and those of the residual stream (embeddings, norms, and every layer
that reads or writes it). The permuted model is an ordinary model with the same outputs, to rounding.

What is maximized is the sum of Wanda scores that an N:M mask keeps (the aim of Pool & Yu 2021, *Channel Permutations
for N:M Sparsity*, NeurIPS; Wanda scores: Zhang et al. 2024, *Plug-and-Play*, ICLR). One channel of each group at a time
is exchanged with those of the other groups, by the pair that gains most, until none does.

Letters: R rows of scores, C channels, G groups of M channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import check_whole, refuse_inference_tensors
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.patterns import NM, nm_mask, parse_pattern
from lightning_prune.pruning.running import on_device
from lightning_prune.pruning.scores import Wanda
from lightning_prune.pruning.statistics import INPUT_NORM
from lightning_prune.pruning.targets import DEFAULT_IGNORE, Target, find_targets
from lightning_prune.safety import uninterrupted
from lightning_prune.sharding import refuse_shards
from lightning_prune.structure.units import Slice, Structure, check_data, read_structure

CHANNELS = ("hidden", "values", "ffn")
# Rows that are looked at, of the many that read the residual stream.
_ROWS = 8192
# Bytes of scores that are compared at once.
_AT_ONCE = 1 << 27


@dataclass(frozen=True)
class Permutation:
    """Shares of the scores that N:M masks keep, by kind of channel, before and after."""

    before: dict[str, float]
    after: dict[str, float]


def best_order(scores: Tensor, pattern: NM, rounds: int = 10) -> Tensor:
    """Return an order of channels whose N:M groups keep more of the scores, ``[C]``, int64.

    Args:
        scores: ``[R, C]``, not negative.
        pattern: N kept of every M.
        rounds: At most, over the M places of a group. A round that gains less than a ten-thousandth is the last.
    """
    channels = scores.shape[1]
    groups = channels // pattern.m
    # The largest channels are dealt out first, one to each group.
    order = scores.sum(0).argsort(descending=True, stable=True).view(pattern.m, groups).t().contiguous()  # [G, M]
    seen = scores[:: -(-len(scores) // _ROWS)]  # rows that gains are measured on
    plain = torch.arange(channels, device=scores.device).view(groups, pattern.m)
    order = max((order, plain), key=lambda o: float(kept_scores(scores[:, o.reshape(-1)], pattern)))
    last = kept_scores(scores[:, order.reshape(-1)], pattern)
    for _ in range(rounds):
        for place in range(pattern.m):
            others = torch.cat([order[:, :place], order[:, place + 1 :]], dim=1)
            gains = torch.zeros(groups, groups, dtype=torch.float64, device=scores.device)
            step = max(1, _AT_ONCE // (groups * groups * scores.element_size()))
            for start in range(0, len(seen), step):
                part = seen[start : start + step]
                # With the others fixed, a channel x counts as far as it exceeds the N-th largest of them.
                bar = part[:, others].topk(pattern.n, dim=-1).values[..., -1]  # [r, G]
                gains += (part[:, None, order[:, place]] - bar[..., None]).clamp_(min=0).sum(0)
            order[:, place] = order[_exchanged(gains), place]
        now = kept_scores(scores[:, order.reshape(-1)], pattern)
        if float(now - last) <= 1e-4 * float(last):
            break
        last = now
    return order.reshape(-1)


def _exchanged(gains: Tensor) -> Tensor:
    """Which group's channel each group gets, ``[G]``, by exchanges of pairs; `gains` ``[G, G]``: group, channel."""
    order = torch.arange(len(gains), device=gains.device)
    gains = gains.clone()
    for _ in range(10 * len(gains)):
        own = gains.diagonal()
        both = gains + gains.t() - own - own[:, None]
        best = int(both.argmax())
        first, second = divmod(best, len(gains))
        if float(both[first, second]) <= 1e-9 * float(own.sum().abs()):
            break
        gains[:, [first, second]] = gains[:, [second, first]]
        order[[first, second]] = order[[second, first]]
    return order


def kept_scores(scores: Tensor, pattern: NM) -> Tensor:
    """Return the sum of the scores that the N:M mask keeps, float64."""
    return (scores * nm_mask(scores, pattern)).sum(dtype=torch.float64)


def check_permutable(
    model: nn.Module,
    pattern: str,
    channels: Sequence[str] = CHANNELS,
    targets: Sequence[str | type[nn.Module]] | None = None,
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE,
) -> tuple[Structure, NM, dict[str, list[tuple[list[Slice], list[str]]]], dict[str, Target]]:
    """Find what `permute_channels` would put in order, which stays as it is.

    Returns:
        The model's structure, the pattern, the places whose order matters to what will be pruned, by kind of channel,
        and that, by name.

    Raises:
        ValueError: see `permute_channels`.
    """
    nm = parse_pattern(pattern)
    if nm is None:
        raise ValueError(f"pattern={pattern!r}: the order of channels matters for N:M only, such as '2:4'")
    if isinstance(channels, str) or not channels or set(channels) - set(CHANNELS):
        raise ValueError(f"channels={channels!r} must be some of {CHANNELS}")
    refuse_shards(model, "permute_channels needs whole parameters, these are sharded over processes: gather the model")
    structure = read_structure(model)
    check_data(structure)
    refuse_inference_tensors(structure.model.named_parameters())
    places = {kind: _places(structure, kind) for kind in CHANNELS if kind in channels}
    chosen = {t.name: t for t in find_targets(structure.model, targets, ignore)}
    prunable = {*chosen, *(t.name for t in find_targets(structure.model))}
    for kind, found in places.items():
        for slices, readers in found:
            if not prunable.intersection(readers):
                raise ValueError(f"channels={channels!r}: no layer to prune reads {kind!r} channels; leave them out")
            readers[:] = [name for name in readers if name in chosen]
            if readers and (size := slices[0].indices.shape[0]) % nm.m:
                raise ValueError(f"pattern={pattern!r}: {size} channels of {kind!r} do not divide by {nm.m}")
        found[:] = [place for place in found if place[1]]
    if not any(places.values()):
        raise ValueError(
            f"channels={channels!r}: none of the layers that targets={targets!r} and ignore={ignore!r} leave to prune, "
            f"such as {next(iter(chosen))!r}, reads them; choose others, or leave the order as it is"
        )
    return structure, nm, {kind: found for kind, found in places.items() if found}, chosen


def permute_channels(
    model: nn.Module,
    batches: Iterable[Any],
    pattern: str = "2:4",
    channels: Sequence[str] = CHANNELS,
    num_samples: int = 128,
    rounds: int = 10,
    progress: bool = True,
    targets: Sequence[str | type[nn.Module]] | None = None,
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE,
) -> Permutation:
    """Reorder the channels of a dense causal language model, in place, so that N:M masks keep more.

    Call it before pruning. The model computes what it did, to rounding, and stays an ordinary one.

    Args:
        model: A transformers model of a known family, or a module that holds one; not sharded or offloaded.
        batches: Calibration data as in `lightning_prune.prune`; input norms are taken in one forward sweep.
        pattern: ``"N:M"``.
        channels: Which orders to choose: any of ``"hidden"``, ``"values"``, ``"ffn"``.
        num_samples: Calibration samples.
        rounds: See `best_order`.
        progress: Show a progress bar in a terminal.
        targets: As they will be given to `lightning_prune.prune`: only layers that it prunes count. Channels that none
            of them reads stay where they are.
        ignore: The same.

    Returns:
        What share of the scores is kept, before and after.

    Raises:
        ValueError: a number that is out of range, an unknown kind, no N:M pattern, an unknown architecture, sharded or
            offloaded parameters, channels that do not divide by M, or that no layer to prune reads.
        CalibrationError: see `lightning_prune.prune`.

    Example::

        permute_channels(model, batches, "2:4")
        prune(model, batches, pattern="2:4", update="exact", sequential=True)
    """
    check_whole("num_samples", num_samples)
    check_whole("rounds", rounds, 0)
    structure, nm, places, chosen = check_permutable(model, pattern, channels, targets, ignore)
    names = sorted({name for found in places.values() for _, readers in found for name in readers})
    statistics = collect(
        structure.model,
        on_device(structure.model, batches),
        [chosen[name] for name in names],
        frozenset({INPUT_NORM}),
        num_samples=num_samples,
        progress=progress,
    )
    before, after = {}, {}
    orders: list[tuple[list[Slice], Tensor]] = []
    with torch.no_grad():
        for kind, found in places.items():
            kept, better, total = 0.0, 0.0, 0.0
            for slices, readers in found:
                scores = torch.cat(
                    [
                        _by_channel(Wanda()(chosen[name].matrix().float(), statistics[name], name), slices, name)
                        for name in readers
                    ]
                )  # [R, C]
                order = best_order(scores, nm, rounds)
                kept += float(kept_scores(scores, nm))
                better += float(kept_scores(scores[:, order], nm))
                total += float(scores.sum(dtype=torch.float64))
                orders.append((slices, order))
            before[kind], after[kind] = kept / total, better / total
        parameters = structure.parameters()
        with uninterrupted():
            for slices, order in orders:
                for s in slices:
                    _reorder(parameters[s.name], s, order)
    return Permutation(before, after)


def _places(structure: Structure, kind: str) -> list[tuple[list[Slice], list[str]]]:
    """Of every place with an order of its own: its slices, and the weights whose inputs its channels are."""
    if kind == "values":
        return _value_heads(structure)
    readers = [[f"{name}.weight" for name in names] for names in structure.readers(kind)]
    return list(zip(structure.slices(kind), readers, strict=True))


def _value_heads(structure: Structure) -> list[tuple[list[Slice], list[str]]]:
    """One place a key/value head and layer: its rows of v, and the columns of o of the query heads that it serves."""
    sizes = structure.sizes
    k, g, e = sizes.num_key_value_heads, sizes.queries_per_group, sizes.head_dim
    inputs = torch.arange(k * g * e, device="cpu").view(k, g, e).transpose(1, 2)  # [k, e, g]
    rows = torch.arange(k * e, device="cpu").view(k, e, 1)
    outputs = {
        "kv": rows,
        "qkv": (k * g + k) * e + rows,
        "heads": torch.arange(k * 3 * e, device="cpu").view(k, 3 * e, 1)[:, 2 * e :],
    }
    found = []
    readers = structure.readers("attention")
    for layer, (output,) in enumerate(readers):
        for head in range(k):
            slices = []
            for name in structure.in_layer(layer):
                for dim, axis in enumerate(structure.axes[name]):
                    if name == f"{output}.weight" and axis == "q":
                        slices.append(Slice(name, dim, inputs[head]))
                    elif axis in ("qkv", "heads") or (axis == "kv" and ".v_proj." in name):
                        slices.append(Slice(name, dim, outputs[axis][head]))
            if all(s.name == f"{output}.weight" for s in slices):
                raise ValueError(
                    f"channels={CHANNELS[1]!r}: what writes the values of {structure.family.model_type!r} is not "
                    f"known, since none of its parameters is called v_proj; leave them out: channels={CHANNELS[::2]}"
                )
            found.append((slices, [f"{output}.weight"]))
    return found


def _by_channel(scores: Tensor, slices: Sequence[Slice], name: str) -> Tensor:
    """Scores ``[O, I]`` of one reader as ``[O * M, C]``, the columns that one channel takes under each other."""
    indices = [s for s in slices if s.name == name][-1].indices.to(scores.device)  # [C, M]
    return scores[:, indices].transpose(1, 2).reshape(-1, indices.shape[0])


def _reorder(parameter: Tensor, place: Slice, order: Tensor) -> None:
    indices = place.indices.to(parameter.device)
    source = indices[order.to(parameter.device)].reshape(-1)
    parameter.index_copy_(place.dim, indices.reshape(-1), parameter.index_select(place.dim, source))
