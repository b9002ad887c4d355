"""Which of a model's own parameters are trained beside the adapters (PERP, arXiv 2312.15230, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lightning_prune.targets import type_name

PARTS = ("bias", "norm", "head", "embedding")


def check_parts(train: Iterable[str]) -> tuple[str, ...]:
    """The parts to train, in a fixed order.

    Raises:
        TypeError: a bare string.
        ValueError: an unknown part.
    """
    if isinstance(train, str):
        raise TypeError(f"train must be a sequence, got the string {train!r}; write train=({train!r},)")
    train = tuple(train)
    unknown = [part for part in train if part not in PARTS]
    if unknown:
        raise ValueError(f"train={train!r} has the unknown part {unknown[0]!r}; it takes any of {PARTS}")
    return tuple(part for part in PARTS if part in train)


def select_parameters(model: nn.Module, train: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of the given parts.

    Args:
        model: A plain model, before any adapter.
        train: Any of ``"bias"`` (every parameter named bias, of norms too), ``"norm"`` (the parameters of
            normalisation layers), ``"head"`` (the output embeddings) and ``"embedding"`` (all embeddings).

    Returns:
        Parameters by name, each once; a part that the model does not have adds nothing, except that a missing head
        is an error. A head tied to the embedding is one parameter with it.

    Raises:
        TypeError, ValueError: an unknown part, or ``"head"`` of a model without one.
    """
    parts = check_parts(train)
    wanted = {id(p) for part in parts for p in _parameters_of(model, part)}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def _parameters_of(model: nn.Module, part: str) -> Iterator[nn.Parameter]:
    if part == "head":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        if not isinstance(head, nn.Module):
            raise ValueError(f"train has 'head', but {type(model).__name__} has no output embeddings; leave it out")
        yield from head.parameters()
        return
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (
                (part == "bias" and name == "bias")
                or (part == "norm" and is_norm(module))
                or (part == "embedding" and isinstance(module, nn.Embedding))
            ):
                yield parameter


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: by its name, since every family of transformers has an RMSNorm of its own."""
    own = list(module.parameters(recurse=False))
    return bool(own) and "norm" in type_name(module).lower() and all(p.dim() <= 1 for p in own)
