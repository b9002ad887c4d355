"""The published pruning algorithms, written out plainly, to measure lightning_prune's speed and quality by.

Nothing here is clever and nothing is imported from lightning_prune: each function follows its paper's
formulas the way the research code runs them, one calibration sequence at a time.

- magnitude: Han et al. 2015, arXiv 1506.02626; one threshold for each weight matrix.
- wanda: Sun et al. 2023, arXiv 2306.11695; block by block, `|W| * norm`, sorted within each output row.
- gblm: Das et al. 2023, arXiv 2311.04902; a gradient stage over the dense model, then block by block as
  Wanda, with `|W| * norm + alpha * |W| * Gbar`.
- sparsegpt: Frantar & Alistarh 2023, arXiv 2301.00774; block by block, every removed weight is compensated.
- kfac: single pass, the formula of this project, in its plainest form; to check the package's own against.

Decoders of the Llama family (`model.model.layers`). Pruned: every `nn.Linear` inside the decoder blocks.
N:M keeps N of every M consecutive inputs. Counts are exact: `floor(sparsity * size)` weights of each
comparison group go.

Shapes: n samples, T tokens, out x in weights.

    python tests/benchmarks/reference.py --model FOLDER --calibration TEXT --evaluation TEXT \\
        --method magnitude wanda --pattern unstructured 2:4 --json FILE
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import common
import torch
from torch import Tensor, nn


@dataclass
class Result:
    """Masks by parameter name (True = kept) and the seconds of each stage."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    watch: common.Stopwatch = field(default_factory=common.Stopwatch)


# --------------------------------------------------------------------------------------- the decoder


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    return model.model.layers


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def weight_name(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}.weight"


def all_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Parameter name -> linear layer, in the order of the decoder."""
    return {
        weight_name(index, name): layer
        for index, block in enumerate(decoder_blocks(model))
        for name, layer in linears(block).items()
    }


class _FirstBlockReached(Exception):  # noqa: N818 - control flow, not an error
    pass


@torch.no_grad()
def block_inputs(model: nn.Module, sequences: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs of the first decoder block, one (1, T, hidden) tensor a sample, and its keyword arguments."""
    hidden: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        arguments.update(kwargs)
        raise _FirstBlockReached

    handle = decoder_blocks(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for sequence in sequences:
            try:
                model(input_ids=sequence[None], use_cache=False)
            except _FirstBlockReached:
                continue
    finally:
        handle.remove()
    return hidden, arguments


@torch.no_grad()
def walk_blocks(
    model: nn.Module, sequences: Tensor, result: Result, make: Callable[[nn.Linear], _Statistic]
) -> Iterator[tuple[int, dict[str, nn.Linear], dict[str, _Statistic]]]:
    """Block by block: collect statistics, hand them out, go on with the pruned block's outputs."""
    with result.watch("norms"):
        hidden, arguments = block_inputs(model, sequences)
    for index, block in enumerate(decoder_blocks(model)):
        layers = linears(block)
        found = {name: make(layer) for name, layer in layers.items()}
        with result.watch("norms"):
            handles = [
                layer.register_forward_hook(lambda _m, args, _o, s=found[name]: s.add(args[0]))
                for name, layer in layers.items()
            ]
            for sample in hidden:
                run_block(block, sample, arguments)
            for handle in handles:
                handle.remove()
        yield index, layers, found
        with result.watch("propagate"):
            hidden = [run_block(block, sample, arguments) for sample in hidden]


def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


# --------------------------------------------------------------------------------------- statistics


class _Statistic:
    def add(self, inputs: Tensor) -> None:
        raise NotImplementedError


class InputNorm(_Statistic):
    """Running mean over samples of the squared norm of every input channel, shape (in,)."""

    def __init__(self, layer: nn.Linear) -> None:
        self.mean_square = torch.zeros(layer.in_features)
        self.samples = 0

    def add(self, inputs: Tensor) -> None:  # (1, T, in)
        square = inputs.reshape(-1, inputs.shape[-1]).float().norm(dim=0) ** 2
        self.samples += 1
        self.mean_square += (square - self.mean_square) / self.samples

    @property
    def norm(self) -> Tensor:
        return self.mean_square.sqrt()


class Hessian(_Statistic):
    """Running mean over samples of `2 X^T X`, shape (in, in)."""

    def __init__(self, layer: nn.Linear) -> None:
        self.matrix = torch.zeros(layer.in_features, layer.in_features)
        self.samples = 0

    def add(self, inputs: Tensor) -> None:
        X = inputs.reshape(-1, inputs.shape[-1]).float()
        self.samples += 1
        self.matrix *= (self.samples - 1) / self.samples
        self.matrix += X.t() @ X * (2 / self.samples)


def gradient_aggregate(model: nn.Module, sequences: Tensor, norm: str = "l2") -> dict[str, Tensor]:
    """`Gbar` of every decoder linear: one forward and one full backward for each sample.

    l2 is `sqrt(sum_i G_i^2)`, l1 is `sum_i |G_i|`. As in the research code every parameter of the model
    receives its gradient; only those of the pruned layers are kept.
    """
    layers = all_linears(model)
    total = {name: torch.zeros_like(layer.weight, requires_grad=False) for name, layer in layers.items()}
    required = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(True)
    for sequence in sequences:
        model.zero_grad(set_to_none=True)
        model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss.backward()
        for name, layer in layers.items():
            grad = layer.weight.grad.detach().float()
            total[name] += grad.abs() if norm == "l1" else grad**2
    model.zero_grad(set_to_none=True)
    for p, value in required.items():
        p.requires_grad_(value)
    return total if norm == "l1" else {name: value.sqrt() for name, value in total.items()}


# --------------------------------------------------------------------------------------- selection


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """None for "unstructured", else (N, M): N kept of every M."""
    if pattern == "unstructured":
        return None
    kept, group = (int(x) for x in pattern.split(":"))
    return kept, group


def keep_largest(score: Tensor, prune: int) -> Tensor:
    """Mask over the last dimension without the `prune` smallest, by a full sort; of equals the first goes."""
    order = torch.sort(score, dim=-1, stable=True).indices
    mask = torch.ones_like(score, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :prune], False)


def select(score: Tensor, sparsity: float, pattern: str, group: str) -> Tensor:
    """Mask of one (out, in) score: by N:M group, output row, or whole layer."""
    nm = parse_pattern(pattern)
    if nm is not None:
        kept, size = nm
        return keep_largest(score.view(score.shape[0], -1, size), size - kept).view_as(score)
    if group == "layer":
        return keep_largest(score.flatten(), int(sparsity * score.numel())).view_as(score)
    return keep_largest(score, int(sparsity * score.shape[1]))


# --------------------------------------------------------------------------------------- the methods


@torch.no_grad()
def magnitude(model: nn.Module, sequences: Tensor, sparsity: float, pattern: str) -> Result:
    result = Result()
    for name, layer in all_linears(model).items():
        with result.watch("selection"):
            mask = select(layer.weight.abs(), sparsity, pattern, "layer")
        layer.weight.mul_(mask)
        result.masks[name] = mask
    return result


@torch.no_grad()
def wanda(
    model: nn.Module,
    sequences: Tensor,
    sparsity: float,
    pattern: str,
    *,
    gradients: dict[str, Tensor] | None = None,
    alpha: float = 0.0,
    result: Result | None = None,
) -> Result:
    result = result or Result()
    for index, layers, statistics in walk_blocks(model, sequences, result, InputNorm):
        for short, layer in layers.items():
            name = weight_name(index, short)
            with result.watch("score"):
                score = layer.weight.abs() * statistics[short].norm
                if gradients is not None:
                    score += alpha * layer.weight.abs() * gradients[name]
            with result.watch("selection"):
                mask = select(score, sparsity, pattern, "row")
            layer.weight.mul_(mask)
            result.masks[name] = mask
    return result


def gblm(
    model: nn.Module,
    sequences: Tensor,
    sparsity: float,
    pattern: str,
    *,
    alpha: float = 100.0,
    grad_norm: str = "l2",
) -> Result:
    result = Result()
    with result.watch("gradient"):
        gradients = gradient_aggregate(model, sequences, grad_norm)
    return wanda(model, sequences, sparsity, pattern, gradients=gradients, alpha=alpha, result=result)


@torch.no_grad()
def sparsegpt(
    model: nn.Module,
    sequences: Tensor,
    sparsity: float,
    pattern: str,
    *,
    columns: int = 128,
    damping: float = 0.01,
) -> Result:
    result = Result()
    for index, layers, statistics in walk_blocks(model, sequences, result, Hessian):
        for short, layer in layers.items():
            with result.watch("solver"):
                H = statistics[short].matrix
                mask = solve_layer(layer, H, sparsity, pattern, columns, damping, result)
            result.masks[weight_name(index, short)] = mask
    return result


def solve_layer(
    layer: nn.Linear, H: Tensor, sparsity: float, pattern: str, columns: int, damping: float, result: Result
) -> Tensor:
    """Prune one layer and spread the error of every removed weight over the columns to its right."""
    nm = parse_pattern(pattern)
    W = layer.weight.detach().clone()
    mask = torch.ones_like(W, dtype=torch.bool)
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    W[:, dead] = 0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)  # U[i, i]^2: inverse Hessian of i, all before it fixed

    for start in range(0, W.shape[1], columns):
        stop = min(start + columns, W.shape[1])
        block, factor = W[:, start:stop].clone(), U[start:stop, start:stop]
        errors = torch.zeros_like(block)
        keep = mask[:, start:stop]
        if nm is None:
            with result.watch("selection"):
                saliency = block**2 / factor.diagonal() ** 2
                keep.copy_(select(saliency, sparsity, pattern, "layer"))
        for i in range(stop - start):
            if nm is not None and i % nm[1] == 0:
                with result.watch("selection"):
                    saliency = block[:, i : i + nm[1]] ** 2 / factor.diagonal()[i : i + nm[1]] ** 2
                    keep[:, i : i + nm[1]] = keep_largest(saliency, nm[1] - nm[0])
            error = block[:, i] * ~keep[:, i] / factor[i, i]
            block[:, i:] -= error[:, None] * factor[i, i:]
            errors[:, i] = error
        W[:, start:stop] = block
        W[:, stop:] -= errors @ U[start:stop, stop:]
    layer.weight.copy_(W * mask)
    return mask


# --------------------------------------------------------------------------------------- kfac


def kfac_statistics(model: nn.Module, sequences: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Norms of inputs (in,) and output gradients (out,), root mean square over samples; one dense sweep."""
    layers = all_linears(model)
    squares = {
        name: (torch.zeros(layer.in_features), torch.zeros(layer.out_features)) for name, layer in layers.items()
    }

    def hook(name: str) -> Callable[..., None]:
        def add(side: int, value: Tensor) -> None:  # (1, T, channels)
            squares[name][side].add_(value.detach().float().flatten(0, -2).square().sum(0))

        def collect(_m: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            add(0, args[0])
            output.register_hook(lambda delta: add(1, delta))

        return collect

    required = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)  # activations need a gradient, weights do not
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    embedding = model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda _m, _a, out: out.requires_grad_(True)))
    for sequence in sequences:
        model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    for p, value in required.items():
        p.requires_grad_(value)
    n = len(sequences)
    return {name: ((x / n).sqrt(), (d / n).sqrt()) for name, (x, d) in squares.items()}


@torch.no_grad()
def kfac_shares(
    weights: dict[str, Tensor], statistics: dict[str, tuple[Tensor, Tensor]], sparsity: float
) -> dict[str, float]:
    """Share of every layer's weights that lie under one global threshold of the score with gamma = 1."""
    scores = {n: W.abs() * statistics[n][0] * statistics[n][1][:, None] for n, W in weights.items()}
    wanted = int(sparsity * sum(s.numel() for s in scores.values()))
    low, high = 0.0, max(s.max().item() for s in scores.values())
    for _ in range(60):  # bisection by counting: sorting all weights of a model at once takes far longer
        threshold = (low + high) / 2
        below = sum(int((s <= threshold).sum()) for s in scores.values())
        low, high = (threshold, high) if below < wanted else (low, threshold)
        if below == wanted:
            break
    return {name: (s <= threshold).float().mean(dtype=torch.float64).item() for name, s in scores.items()}


def kfac_layer_counts(
    weights: dict[str, Tensor],
    shares: dict[str, float],
    sparsity: float,
    mix: float = 0.7,
    clamp: tuple[float, float] = (0.1, 0.9),
) -> dict[str, int]:
    """Weights to prune in each layer: shares clamped, mixed with the uniform sparsity, shifted to fit."""
    sizes = {name: W.numel() for name, W in weights.items()}
    total = sum(sizes.values())
    mixed = {n: mix * min(max(s, clamp[0]), clamp[1]) + (1 - mix) * sparsity for n, s in shares.items()}
    low, high = -1.0, 1.0
    for _ in range(60):  # bisection, since a shifted share stops at 0 and 1
        shift = (low + high) / 2
        reached = sum(sizes[n] * min(max(m + shift, 0.0), 1.0) for n, m in mixed.items()) / total
        low, high = (shift, high) if reached < sparsity else (low, shift)
    counts = {n: int(sizes[n] * min(max(m + high, 0.0), 1.0)) for n, m in mixed.items()}
    missing = int(sparsity * total) - sum(counts.values())
    for name in counts:  # what rounding left over, at most one weight a layer
        step = (missing > 0) - (missing < 0)
        counts[name] += step
        missing -= step
    return counts


@torch.no_grad()
def kfac_masks(
    weights: dict[str, Tensor],
    statistics: dict[str, tuple[Tensor, Tensor]],
    counts: dict[str, int],
    gamma: float = 0.7,
) -> dict[str, Tensor]:
    masks = {}
    for name, W in weights.items():
        inputs, delta = statistics[name]
        score = W.abs() * inputs * (delta**gamma)[:, None]
        masks[name] = keep_largest(score.flatten(), counts[name]).view_as(W)
    return masks


def kfac(
    model: nn.Module,
    sequences: Tensor,
    sparsity: float,
    pattern: str,
    *,
    gamma: float = 0.7,
    mix: float = 0.7,
    clamp: tuple[float, float] = (0.1, 0.9),
) -> Result:
    if parse_pattern(pattern) is not None:
        raise ValueError(f"pattern={pattern!r}: kfac is here for 'unstructured' only (N:M equals wanda)")
    result = Result()
    with result.watch("sweep"):
        statistics = kfac_statistics(model, sequences)
    weights = {name: layer.weight.detach() for name, layer in all_linears(model).items()}
    with result.watch("allocation"):
        counts = kfac_layer_counts(weights, kfac_shares(weights, statistics, sparsity), sparsity, mix, clamp)
    with result.watch("selection"):
        result.masks = kfac_masks(weights, statistics, counts, gamma)
    for name, mask in result.masks.items():
        weights[name].mul_(mask)
    return result


METHODS: dict[str, Callable[..., Result]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "gblm": gblm,
    "sparsegpt": sparsegpt,
    "kfac": kfac,
}


def prune(
    model: nn.Module,
    sequences: Tensor,
    method: str,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Prune `model` in place; masks by parameter name (True = kept), seconds by stage and their total."""
    watch = common.Stopwatch()
    with watch("total"):
        result = METHODS[method](model, sequences, sparsity, pattern, **options)
    return result.masks, result.watch.seconds | watch.seconds


# --------------------------------------------------------------------------------------- command line

KEY = ("implementation", "method", "sparsity", "pattern", "options", "model", "calibration", "windows")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--method", nargs="+", default=["magnitude", "wanda"], choices=list(METHODS))
    p.add_argument("--sparsity", nargs="+", type=float, default=[0.5], help="for the unstructured pattern")
    p.add_argument("--pattern", nargs="+", default=["unstructured"], help="unstructured or N:M (N kept)")
    p.add_argument("--alpha", type=float, default=100.0, help="gblm's weight of the gradient term")
    p.add_argument("--grad-norm", default="l2", choices=["l1", "l2"])
    args = p.parse_args()

    model, tokenizer = common.load(args)
    sequences = common.calibration_of(args, tokenizer)
    evaluations = common.evaluations_of(args, tokenizer)
    snapshot, rows, shown = common.Snapshot(model), common.Rows(args.json, KEY), []

    def record(method: str, sparsity: float, pattern: str, options: dict[str, Any], **extra: Any) -> None:
        row = {"implementation": "reference", "method": method, "sparsity": sparsity, "pattern": pattern}
        row |= {"options": options, **common.settings_of(args)}
        row |= {"perplexity": common.perplexities(model, evaluations), **extra}
        rows.add(row)
        shown.append(
            {"method": method, "pattern": pattern, "sparsity": extra.get("achieved", 0.0)}
            | row["perplexity"]
            | {f"{stage} s": seconds for stage, seconds in extra.get("seconds", {}).items()}
        )

    dense = {"method": "dense", "options": {}, **common.settings_of(args)}
    if (known := rows.find(**dense)) is not None and known["perplexity"].keys() >= evaluations.keys():
        shown.append({"method": "dense", **known["perplexity"]})
    else:
        record("dense", 0.0, "unstructured", {})
    for method in args.method:
        options = {"alpha": args.alpha, "grad_norm": args.grad_norm} if method == "gblm" else {}
        for pattern in args.pattern:
            nm = parse_pattern(pattern)
            for sparsity in args.sparsity if nm is None else [1 - nm[0] / nm[1]]:
                masks, seconds = prune(model, sequences, method, sparsity, pattern, **options)
                if not common.same_zeros(model, masks):
                    raise RuntimeError(f"{method}: a pruned weight is not zero")
                achieved = common.sparsity_of(masks)
                record(method, sparsity, pattern, options, achieved=achieved, seconds=seconds)
                snapshot.restore()
    print(common.markdown(shown))


if __name__ == "__main__":
    main()
