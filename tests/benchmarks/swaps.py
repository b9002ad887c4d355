"""Can ALPS's choice be bettered by exchanging a kept weight and a pruned one of the same N:M group?

For layers of some blocks: the squared error of the outputs under ALPS and under Wanda, both with exact weights, before
and after exchanges. In every round each row makes the exchanges whose gain is largest with all other weights as they
are, the exact weights are fitted anew, and the row goes back where its error has not fallen. Prints errors relative to
the output's squares, and processor seconds.

    python tests/benchmarks/swaps.py --model FOLDER --calibration TEXT --samples 16 --blocks 2 10 20 --threads 1
"""

from __future__ import annotations

import time
from typing import Any

import common
import torch
from ours import ours_alps_mask, ours_exact, ours_nm_mask, ours_normalized
from torch import Tensor, nn

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def hessians(model: nn.Module, names: list[str], sequences: Tensor) -> dict[str, Tensor]:
    """``X^T X`` of each layer on the dense model, float32 from sums in float64."""
    found: dict[str, Any] = dict.fromkeys(names, 0.0)

    def add(name: str, inputs: Tensor) -> None:
        inputs = inputs.flatten(0, -2).double()
        found[name] += inputs.T @ inputs

    hooks = [model.get_submodule(n).register_forward_pre_hook(lambda _, x, n=n: add(n, x[0])) for n in names]
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: sums.float() for name, sums in found.items()}


def errors(change: Tensor, hessian: Tensor) -> Tensor:
    """Squared error of the outputs by row; both in inputs of norm 1."""
    return (change @ hessian * change).sum(1)


def exchanged(weight: Tensor, hessian: Tensor, mask: Tensor, m: int, rounds: int) -> Tensor:
    """The mask after exchanges that lower the error of their row."""
    unit, norms = ours_normalized(hessian)
    dense, groups = weight * norms, weight.shape[1] // m
    places = torch.arange(weight.shape[1]).view(groups, m)
    within = unit[places[:, :, None], places[:, None, :]]  # [G, M, M]
    square = within.diagonal(dim1=1, dim2=2)
    fitted = ours_exact(weight, hessian, mask) * norms
    error, share = errors(fitted - dense, unit), torch.full((len(weight),), 0.25)
    for _ in range(rounds):
        pull = ((dense - fitted) @ unit).view(-1, groups, m)  # minus half of the gradient
        kept, old = mask.view(-1, groups, m), fitted.view(-1, groups, m)
        cost = 2 * pull * old + old.square() * square  # of setting one to zero
        gain = (pull[:, :, None] + old[..., None] * within).square() / square[:, None]  # of the best other one
        net = (gain - cost[..., None]).masked_fill(~(kept[..., None] & ~kept[:, :, None]), -1.0)
        best, pair = net.flatten(2).max(-1)
        many = ((best > 0).sum(1) * share).ceil()
        taken = (best > 0) & (best.argsort(1, descending=True).argsort(1) < many[:, None])
        row, group = taken.nonzero(as_tuple=True)
        new = kept.clone()
        new[row, group, pair[row, group] // m] = False
        new[row, group, pair[row, group] % m] = True
        again = ours_exact(weight, hessian, new.view_as(mask)) * norms
        after = errors(again - dense, unit)
        better = after < error
        mask, fitted = (
            torch.where(better[:, None], new.view_as(mask), mask),
            torch.where(better[:, None], again, fitted),
        )
        error, share = torch.minimum(error, after), torch.where(better, (share * 1.3).clamp(max=1), share * 0.4)
    return mask


def main() -> None:
    p = common.parser(__doc__, evaluation=False)
    p.add_argument("--blocks", type=int, nargs="+", default=[2, 10, 20])
    p.add_argument("--pattern", default="2:4")
    p.add_argument("--rounds", type=int, default=12)
    args = p.parse_args()
    model, tokenizer = common.load(args)
    names = [f"model.layers.{block}.{layer}" for block in args.blocks for layer in LAYERS]
    rows = []
    for name, hessian in hessians(model, names, common.calibration_of(args, tokenizer)).items():
        weight = model.get_submodule(name).weight.detach()
        unit, norms = ours_normalized(hessian)
        row: dict[str, Any] = {"layer": name}
        for method, choose in {"wanda": ours_nm_mask, "alps": ours_alps_mask}.items():
            mask = choose(weight, hessian, args.pattern)
            start = time.process_time()
            other = exchanged(weight, hessian, mask, int(args.pattern.partition(":")[2]), args.rounds)
            row[f"{method} s"] = time.process_time() - start
            for label, chosen in {method: mask, f"{method} exchanged": other}.items():
                change = (ours_exact(weight, hessian, chosen) - weight) * norms
                row[label] = float(errors(change, unit).sum() / errors(weight * norms, unit).sum())
        rows.append(row)
        print(common.markdown(rows[-1:]), flush=True)
    print("\n" + common.markdown(rows))


if __name__ == "__main__":
    main()
