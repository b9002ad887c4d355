"""Row groups: does it help to fit the kept weights on tokens weighted by the gradients of the rows' own outputs?

`update="exact"` minimizes the error of a layer's outputs over all tokens alike. Here the rows of a layer are divided
into groups, and each has a Hessian of its own, ``X^T diag(w) X``, with w a token's mean squared output gradient in the
group (of the dense model), divided by its mean over tokens, and mixed with 1. One mask for all; block by block on the
outputs of the fitted blocks before. Prints perplexities.

    python tests/benchmarks/row_groups.py --model FOLDER --calibration TEXT --evaluation TEXT TEXT2 \\
        --patterns 50 2:4 --threads 1
"""

from __future__ import annotations

from typing import Any

import common
import torch
from ours import ours_prune
from torch import Tensor, nn

from lightning_prune.pruning.exact import exact_weights

# Groups of rows, and how much of the weight is theirs. None: all tokens alike.
VARIANTS: dict[str, tuple[int, float] | None] = {
    "exact": None,
    "1 group": (1, 1.0),
    "1 group, half": (1, 0.5),
    "4 groups": (4, 1.0),
    "4 groups, half": (4, 0.5),
    "16 groups, half": (16, 0.5),
}
MOST = max(variant[0] for variant in VARIANTS.values() if variant)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}  # type: ignore[operator, union-attr]


def token_weights(model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
    """Mean squared output gradient of each token in each of `MOST` runs of rows, by layer, ``[N, MOST]``."""
    found: dict[str, list[Tensor]] = {name: [] for name in linears_of(model)}

    def watch(name: str) -> Any:
        def see(_: nn.Module, __: Any, gradient: tuple[Tensor, ...]) -> None:
            parts = gradient[0][0].square().tensor_split(MOST, dim=1)
            found[name].append(torch.stack([part.mean(1) for part in parts], 1))

        return see

    handles = [layer.register_full_backward_hook(watch(name)) for name, layer in linears_of(model).items()]
    for ids in sequences:
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        model.zero_grad()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def walk(
    model: nn.Module, sequences: Tensor, masks: dict[str, Tensor], weights: dict[str, Tensor], variant: Any
) -> None:
    """Fit the weights on their masks, a block after the other."""
    inputs: list[tuple[Tensor, dict[str, Any]]] = []
    blocks = model.model.layers  # type: ignore[union-attr]

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0], kwargs))

    handle = blocks[0].register_forward_pre_hook(take, with_kwargs=True)  # type: ignore[index, union-attr]
    for ids in sequences:
        model(input_ids=ids[None], use_cache=False)
    handle.remove()
    for index, block in enumerate(blocks):  # type: ignore[arg-type]
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        rows: dict[str, list[Tensor]] = {name: [] for name in layers}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, seen=rows[name]: seen.append(args[0][0]))
            for name, layer in layers.items()
        ]
        for x, kwargs in inputs:
            block(x, **kwargs)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            x, path = torch.cat(rows[name]), f"{index}.{name}"
            mask = masks[f"model.layers.{path}.weight"]
            if variant is None:
                layer.weight.copy_(exact_weights(layer.weight, x.t() @ x, mask))
                continue
            groups, share = variant
            every = weights[path].unflatten(1, (groups, MOST // groups)).mean(2)  # [N, groups]
            every = 1 - share + share * every / every.mean(0)
            pieces = zip(layer.weight.tensor_split(groups), mask.tensor_split(groups), every.unbind(1), strict=True)
            layer.weight.copy_(torch.cat([exact_weights(w, x.t() @ (x * by[:, None]), m) for w, m, by in pieces]))
        inputs = [(out[0] if isinstance(out := block(x, **kw), tuple) else out, kw) for x, kw in inputs]


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--patterns", nargs="+", default=["50", "2:4"])
    args = p.parse_args()
    model, tokenizer = common.load(args)
    sequences, evaluations = common.calibration_of(args, tokenizer), common.evaluations_of(args, tokenizer)
    rows, snapshot = common.Rows(args.json, ("pattern", "method")), common.Snapshot(model)
    weights = token_weights(model, sequences)
    for pattern in args.patterns:
        snapshot.restore()
        masks = ours_prune(model, sequences, "kfac", 0.5, "unstructured" if pattern == "50" else pattern, 4)
        for method, variant in VARIANTS.items():
            snapshot.restore()
            walk(model, sequences, masks, weights, variant)
            if not common.same_zeros(model, masks):
                raise RuntimeError(f"{method}: a pruned weight is not zero")
            rows.add({"pattern": pattern, "method": method, **common.perplexities(model, evaluations)})
    print(common.markdown(rows.rows))


if __name__ == "__main__":
    main()
