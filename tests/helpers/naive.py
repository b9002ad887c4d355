"""An independent float64 reference, written from the formulas with explicit loops. It imports nothing of the package.

Matrices are numpy arrays ``(out, in)``; a convolution's columns are ordered (kernel row, kernel column, channel).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray


def matrix(module: nn.Module, weight: Tensor) -> Array:
    """A weight-shaped tensor as ``(out, in)``."""
    value = weight.detach().cpu()
    if isinstance(module, nn.Conv2d):
        value = value.permute(0, 2, 3, 1).reshape(value.shape[0], -1)
    elif type(module).__name__ == "Conv1D":
        value = value.t()
    return value.numpy() if value.dtype == torch.bool else value.double().numpy()


def input_rows(module: nn.Module, x: Tensor) -> Array:
    """What the rows of the weight are multiplied with, for the input of one sample: ``(positions, in)``."""
    x = x.detach().double()
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1]).numpy()
    assert x.shape[0] == 1
    ph, pw = (0, 0) if module.padding == "valid" else module.padding
    kh, kw = module.kernel_size
    dh, dw = module.dilation
    sh, sw = module.stride
    channels, height, width = x.shape[1:]
    padded = np.zeros((channels, height + 2 * ph, width + 2 * pw))
    padded[:, ph : ph + height, pw : pw + width] = x[0].numpy()
    rows = []
    for i in range(0, padded.shape[1] - dh * (kh - 1), sh):
        for j in range(0, padded.shape[2] - dw * (kw - 1), sw):
            rows.append(
                [padded[c, i + a * dh, j + b * dw] for a in range(kh) for b in range(kw) for c in range(channels)]
            )
    return np.array(rows)


def output_rows(module: nn.Module, y: Tensor) -> Array:
    y = y.detach().double()
    if isinstance(module, nn.Conv2d):
        return y[0].flatten(1).t().numpy()
    return y.reshape(-1, y.shape[-1]).numpy()


def next_token_loss(model: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of one sequence ``input_ids (1, T)``, token by token."""
    logits = model(input_ids=sample["input_ids"]).logits[0]
    labels = sample.get("labels", sample["input_ids"])[0]
    terms = [
        -torch.log_softmax(logits[t].double(), dim=-1)[labels[t + 1]]
        for t in range(len(labels) - 1)
        if int(labels[t + 1]) != -100
    ]
    return torch.stack(terms).sum() / len(terms)


def statistics(
    model: nn.Module,
    samples: Sequence[Any],
    layers: Mapping[str, Sequence[str] | str],
    loss: Callable[[nn.Module, Any], Tensor] = next_token_loss,
) -> dict[str, dict[str, Array]]:
    """Statistics of layers: one forward and one autograd backward per sample, of a float64 copy of the model.

    `layers` gives the module name(s) of each parameter; parameters are looked up in the first module.
    """
    model = copy.deepcopy(model).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    groups = {
        name: [model.get_submodule(m) for m in ([modules] if isinstance(modules, str) else modules)]
        for name, modules in layers.items()
    }
    seen: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output.retain_grad()
            seen[name].append((module, args[0].detach().clone(), output))
            return output.clone()  # what follows may change it in place

        return hook

    for name, modules in groups.items():
        for module in modules:
            module.register_forward_hook(watch(name))
    out: dict[str, dict[str, Array]] = {}
    for sample in samples:
        for entries in seen.values():
            entries.clear()
        model.zero_grad(set_to_none=True)
        loss(model, sample).backward()
        for name, modules in groups.items():
            o, i = matrix(modules[0], modules[0].weight).shape
            sums = out.setdefault(
                name,
                {
                    "x2": np.zeros(i),
                    "d2": np.zeros(o),
                    "xx": np.zeros((i, i)),
                    "gradient_l1": np.zeros((o, i)),
                    "g2": np.zeros((o, i)),
                },
            )
            for module, x, y in seen[name]:
                for row in input_rows(module, x):
                    sums["x2"] += row * row
                    sums["xx"] += np.outer(row, row)
                for row in output_rows(module, y.grad):
                    sums["d2"] += row * row
            gradient = matrix(modules[0], modules[0].weight.grad)
            sums["gradient_l1"] += np.abs(gradient)
            sums["g2"] += gradient * gradient
    n = len(samples)
    return {
        name: {
            "input_norm": np.sqrt(s["x2"] / n),
            "output_grad_norm": np.sqrt(s["d2"] / n),
            "gradient_l1": s["gradient_l1"],
            "gradient_l2": np.sqrt(s["g2"]),
            "hessian": s["xx"] / n,
        }
        for name, s in out.items()
    }


# -- scores ----------------------------------------------------------------------------------------------------------


def score(
    name: str, weight: Array, stats: Mapping[str, Array], alpha: float = 100.0, gamma: float = 0.7, norm: str = "l2"
) -> Array:
    """Scores element by element."""
    out = np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            w = abs(weight[i, j])
            if name == "magnitude":
                out[i, j] = w
            elif name == "wanda":
                out[i, j] = w * stats["input_norm"][j]
            elif name == "gradient":
                out[i, j] = w * stats["gradient_" + norm][i, j]
            elif name == "gblm":
                out[i, j] = w * stats["input_norm"][j] + alpha * w * stats["gradient_" + norm][i, j]
            elif name == "kfac":
                out[i, j] = w * stats["input_norm"][j] * stats["output_grad_norm"][i] ** gamma
            else:
                raise KeyError(name)
    return out


# -- masks -----------------------------------------------------------------------------------------------------------


def lowest(values: Array, count: int) -> Array:
    """Mask that prunes the `count` lowest along the last axis; ties in order of position."""
    mask = np.ones(values.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(values, axis=-1, kind="stable")[..., :count], False, -1)
    return mask


def row_mask(scores: Array, count: int) -> Array:
    """`count` weights of the matrix, in equal numbers from each row, the remainder from the first rows."""
    rows = scores.shape[0]
    return np.stack([lowest(row, count // rows + (i < count % rows)) for i, row in enumerate(scores)])


def layer_mask(scores: Array, count: int) -> Array:
    return lowest(scores.reshape(-1), count).reshape(scores.shape)


def nm_mask(scores: Array, n: int, m: int) -> Array:
    rows, whole = scores.shape[0], scores.shape[1] // m * m
    groups = lowest(scores[:, :whole].reshape(-1, m), m - n).reshape(rows, whole)
    return np.concatenate([groups, lowest(scores[:, whole:], m - n)], axis=1)


def masks(
    scores: Mapping[str, Array], sparsity: float, group: str, nm: tuple[int, int] | None = None
) -> dict[str, Array]:
    """Masks of all layers at one uniform sparsity."""
    if nm is not None:
        return {name: nm_mask(s, *nm) for name, s in scores.items()}
    if group == "row":
        return {name: row_mask(s, s.shape[0] * math.floor(sparsity * s.shape[1])) for name, s in scores.items()}
    if group == "layer":
        return {name: layer_mask(s, math.floor(sparsity * s.size)) for name, s in scores.items()}
    flat = np.concatenate([s.reshape(-1) for s in scores.values()])
    kept = lowest(flat, math.floor(sparsity * flat.size))
    out, start = {}, 0
    for name, s in scores.items():
        out[name] = kept[start : start + s.size].reshape(s.shape)
        start += s.size
    return out


def near_ties(scores: Array, mask: Array, other: Array, axis: str, tolerance: float) -> bool:
    """Whether two masks of one layer differ only in weights within `tolerance` of their group's threshold."""
    if axis == "row":
        return all(
            near_ties(s[None], a[None], b[None], "layer", tolerance)
            for s, a, b in zip(scores, mask, other, strict=True)
        )
    if mask.sum() != other.sum():
        return False
    differ = mask != other
    if not differ.any():
        return True
    threshold = scores[~mask].max()
    return bool(np.all(np.abs(scores[differ] - threshold) <= tolerance * threshold))


# -- allocation ------------------------------------------------------------------------------------------------------


def shifted(sparsities: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, float]:
    """Real-valued counts after one common shift; for sparsities that stay inside (0, 1)."""
    shift = (total - sum(sparsities[n] * sizes[n] for n in sizes)) / sum(sizes.values())
    assert all(0 < s + shift < 1 for s in sparsities.values())
    return {n: (sparsities[n] + shift) * sizes[n] for n in sizes}


def kfac_sparsities(
    scores: Mapping[str, Array], sparsity: float, mix: float = 0.7, low: float = 0.1, high: float = 0.9
) -> dict[str, float]:
    """From kfac scores with gamma = 1."""
    kept = masks(scores, sparsity, "global")
    return {name: mix * min(max(1 - kept[name].mean(), low), high) + (1 - mix) * sparsity for name in scores}


def owl_sparsities(
    wanda: Mapping[str, Array], block_of: Mapping[str, str], sparsity: float, multiple: float, spread: float
) -> dict[str, float]:
    """The paper's formula: ratios scaled to a width of 2 lambda, centred so that their mean is the uniform density."""
    blocks = list(dict.fromkeys(block_of.values()))
    ratio = []
    for block in blocks:
        values = np.concatenate([wanda[n].reshape(-1) for n in wanda if block_of[n] == block])
        ratio.append(np.mean(values > multiple * values.mean()))
    scaled = (np.array(ratio) - min(ratio)) / (max(ratio) - min(ratio)) * 2 * spread
    density = scaled - scaled.mean() + 1 - sparsity
    return {n: 1 - density[blocks.index(block_of[n])] for n in wanda}


# -- SparseGPT -------------------------------------------------------------------------------------------------------


def sparsegpt(
    weight: Array,
    hessian: Array,
    mask: Array | None = None,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Array, Array]:
    """Algorithm 1 of arXiv 2301.00774, without lazy batching: every column updates all columns after it at once."""
    weight, hessian = weight.copy(), hessian.copy()
    rows, columns = weight.shape
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1.0
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    kept = np.ones(weight.shape, dtype=bool) if mask is None else mask.copy()
    for j in range(columns):
        if mask is None:
            width = block if nm is None else nm[1]
            if j % width == 0:
                part = slice(j, min(j + width, columns))
                saliency = weight[:, part] ** 2 / np.diag(factor)[part] ** 2
                if nm is None:
                    assert sparsity is not None
                    count = sparsity * saliency.size
                    assert count == int(count), "choose sizes at which every block's count is whole"
                    kept[:, part] = layer_mask(saliency, int(count))
                else:
                    kept[:, part] = nm_mask(saliency, *nm)
        for i in range(rows):
            if not kept[i, j]:
                error = weight[i, j] / factor[j, j]
                weight[i, j:] -= error * factor[j, j:]
                weight[i, j] = 0.0
    # Rounding leaves tiny values where an update should have left exactly zero.
    return np.where(kept, weight, 0.0), kept


# -- exact weights, ALPS ---------------------------------------------------------------------------------------------


def damped(hessian: Array, damping: float = 0.01) -> Array:
    """With a share of the mean diagonal, over inputs that were not always zero, added to the diagonal."""
    diagonal = np.diag(hessian)
    return hessian + damping * diagonal[diagonal > 0].mean() * np.eye(len(hessian))


def exact(weight: Array, hessian: Array, mask: Array) -> Array:
    """Row by row the normal equations ``H_qq w_q = H_q: w_dense`` of its kept inputs q; `hessian` is damped already."""
    new = np.zeros_like(weight)
    for row, kept in enumerate(mask):
        q = np.flatnonzero(kept)
        if len(q):
            new[row, q] = np.linalg.solve(hessian[np.ix_(q, q)], hessian[q] @ weight[row])
    return new


def surgeon(weight: Array, hessian: Array, importance: Array, groups: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """The order in which groups of inputs go, the cheapest first, and what each costs then; all anew for each."""
    whole, ridge = damped(hessian), damped(hessian) - hessian
    left, order, costs = list(range(len(groups))), [], []
    while left:
        kept = [i for g in left for i in groups[g]]
        gone = [i for g in order for i in groups[g]]
        inverse = np.linalg.inv(whole[np.ix_(kept, kept)])
        now = weight[:, kept] + weight[:, gone] @ whole[np.ix_(gone, kept)] @ inverse

        def cost(group: int, kept: list[int] = kept, inverse: Array = inverse, now: Array = now) -> float:
            where = [kept.index(i) for i in groups[group]]
            cannot = np.linalg.inv(inverse[np.ix_(where, where)]) - ridge[np.ix_(groups[group], groups[group])]
            return float(np.sum(importance * np.einsum("om,mn,on->o", now[:, where], cannot, now[:, where])))

        chosen = min(left, key=cost)
        costs.append(max([cost(chosen), *costs]))
        order.append(chosen)
        left.remove(chosen)
    return np.array(order), np.array(costs)


def alps(
    weight: Array,
    hessian: Array,
    factors: Array,
    select: Callable[[Array], Array],
    rho: float = 0.1,
    most: int = 300,
) -> tuple[Array, int]:
    """The support of arXiv 2406.07831, algorithm 1, and the number of iterations; `hessian` is damped already.

    `factors` are what the score makes of weights of one.
    """
    scale = 1 / np.sqrt(np.diag(hessian))
    dense, hessian, factors = weight / scale, scale[:, None] * hessian * scale, factors * scale
    values, vectors = np.linalg.eigh(hessian)
    d, v, seen = dense, np.zeros_like(dense), np.ones(dense.shape, dtype=bool)
    for iteration in range(1, most + 1):
        w = (dense @ hessian - v + rho * d) @ vectors @ np.diag(1 / (values + rho)) @ vectors.T
        mask = select(np.abs(w + v / rho) * factors)
        d = np.where(mask, w + v / rho, 0)
        v = v + rho * (w - d)
        if iteration % 3 == 0:
            changed = (mask != seen).sum() / mask.sum()
            if changed == 0:
                break
            rho *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            seen = mask
    return mask, iteration


def sequential(
    model: nn.Module,
    samples: Sequence[Mapping[str, Tensor]],
    layers: Sequence[Sequence[str]],
    prune_layer: Callable[[str, Array, Mapping[str, Array]], tuple[Array, Array]],
) -> tuple[nn.Module, dict[str, Array]]:
    """Block by block: the inputs of block k are those of the whole model with the blocks before k already pruned.

    `layers` lists the module names of each block of a Llama model; `prune_layer(name, weight, forward statistics)`
    gives the new weight and its mask. Returns the pruned float64 model and the masks.
    """
    model = copy.deepcopy(model).double().eval()
    found: dict[str, Array] = {}
    for names in layers:
        sums: dict[str, Any] = dict.fromkeys(names, 0.0)
        handles = []
        for name in names:

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, key: Any = (name, sums)) -> None:
                for row in input_rows(module, args[0]):
                    key[1][key[0]] = key[1][key[0]] + np.outer(row, row)

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        with torch.no_grad():
            for sample in samples:
                model(input_ids=sample["input_ids"])
        for handle in handles:
            handle.remove()
        for name in names:
            weight = model.get_submodule(name).weight
            hessian = sums[name] / len(samples)
            new, kept = prune_layer(
                name, weight.detach().numpy().copy(), {"hessian": hessian, "input_norm": np.sqrt(np.diag(hessian))}
            )
            with torch.no_grad():
                weight.copy_(torch.from_numpy(new))
            found[name + ".weight"] = kept
    return model, found
