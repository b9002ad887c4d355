"""Experts whose weights are 3-D parameters, as transformers keeps them: one matrix an expert, each a layer of its own.

A statistic of an expert is made of the tokens routed to it. So while samples run, the experts of a layer are computed
one after the other, and each product ``x @ W[e]`` passes through a module (`ExpertMatrix`) that hooks can be put on.
It is what every ``experts_implementation`` of transformers computes, so statistics do not depend on which one is set.

Dimensions: E experts, N tokens of a batch (of B samples, one after the other), K experts a token, R tokens routed to
one expert, F channels between its two products, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.naming import own_parameters
from lightning_prune.pruning.forwards import forwards_replaced
from lightning_prune.pruning.offloading import at_hand

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Routed:
    """The tokens that one expert sees in one call.

    Attributes:
        tokens: ``[R]``, their places among the N tokens of the batch, in ascending order.
        total: N.
    """

    tokens: Tensor
    total: int

    def keep(self, real: Tensor) -> Tensor | None:
        """Which of the tokens are real, ``[1, R]``; None where the mask ``[B, T]`` is not one of these tokens."""
        return real.reshape(-1).to(self.tokens.device)[self.tokens][None] if real.numel() == self.total else None

    def divides_into(self, samples: int) -> bool:
        """Whether the tokens of the batch can be those of so many samples of one length."""
        return self.total % samples == 0

    def by_sample(self, rows: Tensor, samples: int) -> Tensor:
        """Rows ``[1, R, C]`` to ``[B, T, C]``, with zeros behind those of a sample with fewer tokens than another.

        Where the tokens cannot be those of so many samples, the rows stay as they are.
        """
        if not self.divides_into(samples):
            return rows
        sample = self.tokens // (self.total // samples)  # [R]
        counts = torch.bincount(sample, minlength=samples)
        position = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]
        spread = rows.new_zeros(samples, int(counts.max()), rows.shape[-1])
        spread[sample, position] = rows.reshape(-1, rows.shape[-1])
        return spread


class ExpertMatrix(nn.Module):
    """One slice of the 3-D parameter of a layer's experts, as a linear layer. It is no part of the model.

    Args:
        experts: The module that holds the parameter.
        name: The parameter's name in it.
        index: Which expert.
        transposed: Whether the parameter is ``[E, I, O]``, not ``[E, O, I]``.
    """

    def __init__(self, experts: nn.Module, name: str, index: int, transposed: bool) -> None:
        super().__init__()
        self.holder = (experts,)  # in a tuple, or the experts would be a part of it
        self.name, self.index, self.transposed = name, index, transposed
        self.routed: Routed | None = None  # of the call that runs

    @property
    def experts(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.holder[0]

    @property
    def weight(self) -> Tensor:
        """The whole parameter, of all experts, as it is now.

        Gathered while a sharded model runs. No parameter is what ``torch.func.functional_call`` puts there, nor its sum
        with an adapter, while a wrapper of PEFT around the experts runs.
        """
        weight: Tensor = getattr(self.experts, self.name)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Multiply rows ``[R, I]`` with the expert's matrix, ``[R, O]``."""
        weight = self.weight.detach()[self.index]  # frozen while statistics are collected
        bias = getattr(self.experts, f"{self.name}_bias", None)
        return F.linear(
            x.to(weight.dtype), weight.t() if self.transposed else weight, None if bias is None else bias[self.index]
        )


def expert_parameters(module: nn.Module) -> dict[str, bool]:
    """Names of the 3-D parameters of a layer's experts, and whether each is ``[E, I, O]``; empty for other modules.

    Experts are known by what transformers gives them to run under any ``experts_implementation``; Llama 4's by name.
    """
    own = own_parameters(module)
    names = [name for name in (*_UP, _DOWN) if name in own and own[name].dim() == 3]
    if len(names) != 2 or names[1] != _DOWN:
        return {}
    if _takes_sorted(module):
        return dict.fromkeys(names, True)
    transposed = getattr(module, "is_transposed", None)
    known = isinstance(transposed, bool) and hasattr(module, "_apply_gate") and hasattr(module, "has_gate")
    return dict.fromkeys(names, bool(transposed)) if known else {}


def _takes_sorted(module: nn.Module) -> bool:
    """Whether experts receive every token times its weight for each of them, ``[E * N, H]`` (Llama 4).

    Not before transformers 5, which has a file for experts: masks differed there from those of written-out experts.
    """
    return any(cls.__name__ == "Llama4TextExperts" for cls in type(module).__mro__) and (
        find_spec("transformers.integrations.moe") is not None
    )


See = Callable[[nn.Module, int, Routed, Tensor, Tensor], None]


@contextmanager
def written_out(
    matrices: Iterable[ExpertMatrix], beside: Iterable[nn.Module] = (), see: See | None = None
) -> Iterator[None]:
    """While the block runs, the experts that some matrices belong to call each of their matrices as a module.

    Args:
        matrices: Known from outside, to put hooks on.
        beside: More modules that hold experts.
        see: Called with such a module, the number of an expert, the R tokens routed to it, what it makes of them
            ``[R, H]``, and their weights ``[R]``. Not for experts that receive weighted tokens (Llama 4).
    """
    stacks: dict[nn.Module, dict[str, dict[int, ExpertMatrix]]] = {experts: {} for experts in beside}
    for matrix in matrices:
        stacks.setdefault(matrix.experts, {}).setdefault(matrix.name, {})[matrix.index] = matrix
    others: dict[nn.Module, Callable[..., Tensor]] = {}
    for experts, known in stacks.items():
        run = _run_sorted if _takes_sorted(experts) else partial(_run_routed, see=see)
        others[experts] = partial(_at_hand, run, experts, _all_matrices(experts, known))
    with forwards_replaced(others):
        yield


def _at_hand(run: Callable[..., Tensor], experts: nn.Module, *arguments: Any, **named: Any) -> Tensor:
    """Run experts with their weights where they are needed: what brings offloaded ones stands aside here."""
    with at_hand(experts):
        return run(experts, *arguments, **named)


def _all_matrices(
    experts: nn.Module, known: dict[str, dict[int, ExpertMatrix]]
) -> tuple[Callable[[int], ExpertMatrix], Callable[[int], ExpertMatrix]]:
    """The matrices of the first and the second product by expert; those that nobody looks at are made on the way."""

    def find(name: str, transposed: bool, index: int) -> ExpertMatrix:
        return known.get(name, {}).get(index) or ExpertMatrix(experts, name, index, transposed)

    first, second = (partial(find, name, transposed) for name, transposed in expert_parameters(experts).items())
    return first, second


Matrices = tuple[Callable[[int], ExpertMatrix], Callable[[int], ExpertMatrix]]


def _run_routed(
    experts: Any,
    matrices: Matrices,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    see: See | None = None,
) -> Tensor:
    """The weighted sum over each token's experts, ``[N, H]``.

    Args:
        experts: The module.
        matrices: Its matrices.
        hidden_states: ``[N, H]``.
        top_k_index: ``[N, K]``, the experts of each token; a number beyond them is none.
        top_k_weights: ``[N, K]``.
        see: See `written_out`.
    """
    first, second = matrices
    number, chosen = _stack_size(experts), top_k_index.shape[-1]
    order = top_k_index.reshape(-1).argsort(stable=True)  # [N * K], by expert, then by token
    counts = torch.bincount(top_k_index.reshape(-1).clamp(max=number), minlength=number + 1).tolist()
    # Summed in the wider dtype of the two, as transformers' batched and grouped products are.
    wide = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
    output = torch.zeros_like(hidden_states, dtype=wide)
    for index, places in enumerate(torch.split(order, counts)[:number]):
        if len(places):
            tokens, shares = places // chosen, top_k_weights.reshape(-1)[places]
            made = _run_expert(experts, first(index), second(index), hidden_states[tokens], tokens, len(hidden_states))
            if see is not None:
                see(experts, index, Routed(tokens, len(hidden_states)), made, shares)
            output = output.index_add(0, tokens, (made * shares[:, None]).to(wide))
    return output.to(hidden_states.dtype)


def _run_sorted(experts: Any, matrices: Matrices, hidden_states: Tensor) -> Tensor:
    """What each expert makes of the tokens routed to it, and zeros for all others, ``[E * N, H]`` to the same."""
    first, second = matrices
    outputs = []
    for index, states in enumerate(hidden_states.view(_stack_size(experts), -1, hidden_states.shape[-1])):
        tokens = (
            states.detach().ne(0).any(-1).nonzero()[:, 0]
        )  # a token's weight for an expert it is not routed to is 0
        made = torch.zeros_like(states)
        if len(tokens):
            rows = _run_expert(experts, first(index), second(index), states[tokens], tokens, len(states))
            made = made.index_copy(0, tokens, rows.to(made.dtype))
        outputs.append(made)
    return torch.cat(outputs)


def _stack_size(experts: nn.Module) -> int:
    return len(getattr(experts, _DOWN))


def _run_expert(
    experts: Any, first: ExpertMatrix, second: ExpertMatrix, rows: Tensor, tokens: Tensor, total: int
) -> Tensor:
    """One expert's output, ``[R, H]``, before the router's weight."""
    first.routed = second.routed = Routed(tokens, total)
    between = first(rows)  # [R, 2F], or [R, F] without a gate
    if _takes_sorted(experts):
        gate, up = between.chunk(2, dim=-1)
        between = up * experts.act_fn(gate)
    else:
        between = experts._apply_gate(between) if experts.has_gate else experts.act_fn(between)
    output: Tensor = second(between)
    return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output
