"""Per-sample losses of causal language models, and which tokens they predict.

Pruning scores need one gradient a sample, so the losses here are not averaged over the batch.

Letters: B samples, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from lightning_prune.batches import padding_mask, tensors_of

IGNORE_INDEX = -100


def next_token_labels(batch: Mapping[str, Any]) -> torch.Tensor:
    """Choose the labels of a batch for next-token prediction: ``batch["labels"]``, else the input ids.

    A token is predicted from the one before it, so both must be real: padding is never predicted, nor is the first
    token after it, whoever made the labels. Nor is the first token of a text in a packed row (where ``position_ids``
    begin again at 0, or ``cu_seq_lens_q`` says so).

    Args:
        batch: "input_ids" of shape (B, T); "labels" of the same, not shifted; a mask (see
            `lightning_prune.batches.padding_mask`).

    Returns:
        Labels (B, T), not shifted, `IGNORE_INDEX` where nothing is predicted.

    Raises:
        ValueError: the mask has another shape than the labels.
    """
    labels: torch.Tensor = batch["input_ids"] if batch.get("labels") is None else batch["labels"]
    real = padding_mask(batch)
    if real is not None:
        if real.shape != labels.shape:
            raise ValueError(f"the attention mask has shape {tuple(real.shape)}, the labels {tuple(labels.shape)}")
        predicted = real.clone()
        predicted[:, 1:] &= real[:, :-1]
        labels = labels.masked_fill(~predicted.to(labels.device), IGNORE_INDEX)
    if (starts := _text_starts(batch, labels)) is not None:
        labels = labels.masked_fill(starts.to(labels.device), IGNORE_INDEX)
    return labels


def _text_starts(batch: Mapping[str, Any], labels: torch.Tensor) -> torch.Tensor | None:
    """Where texts of packed rows begin, in a shape that fits the labels (B, T)."""
    places, ends = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(places, torch.Tensor) and places.shape in (labels.shape, (1, labels.shape[1])):
        return places == 0 if bool(places.any()) else None
    if isinstance(ends, torch.Tensor):
        starts = torch.zeros(1, labels.shape[1] + 1, dtype=torch.bool, device=ends.device)
        starts[:, ends.long()] = True
        return starts[:, :-1]
    return None


def causal_lm_losses(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX, allow_empty: bool = False
) -> torch.Tensor:
    """Mean next-token cross-entropy of each sample.

    The shift is done here: the logits at position t are compared with the label at position t + 1; `labels`
    is `input_ids` with ignored positions replaced by `ignore_index`.

    Args:
        logits: Scores of shape (B, T, V), any floating dtype; the loss is computed in float32
            (float64 stays as it is).
        labels: Token ids of shape (B, T).
        ignore_index: Label that is not predicted (padding, prompts).
        allow_empty: Give samples without a label to predict a loss of NaN (and no gradient), in place of an error.

    Returns:
        Losses in nats per predicted token, of shape (B,).

    Raises:
        ValueError: If the shapes do not agree, or a sample has no label to predict.

    Example:
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, 1, -100]])
        >>> [round(loss, 4) for loss in causal_lm_losses(logits, labels).tolist()]  # log(4)
        [1.3863, 1.3863]
    """
    losses = next_token_losses(logits, labels, ignore_index)  # [B, T - 1]
    counts = (labels[:, 1:] != ignore_index).sum(dim=1)  # [B]
    if allow_empty:
        return (losses.sum(dim=1) / counts.clamp(min=1)).masked_fill(counts == 0, float("nan"))
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"labels of sample(s) {empty} leave no token to predict: after the first position all are "
            f"{ignore_index} (ignore_index). Pass samples with at least two tokens that are not padding."
        )
    return losses.sum(dim=1) / counts


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Cross-entropy of every next token.

    Args:
        logits: Scores of shape (B, T, V).
        labels: Token ids of shape (B, T), not shifted.
        ignore_index: Label that is not predicted.

    Returns:
        Losses in nats, of shape (B, T - 1), in float32 or wider; zero where the label is `ignore_index`.

    Raises:
        ValueError: If the shapes do not agree.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must have shape (B, T, V) and labels (B, T); received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}. Pass the labels unshifted, one for each position of the input."
        )
    # The labels are shifted, not the logits: a slice of them would be copied, forward and backward.
    targets = torch.full_like(labels, ignore_index)
    targets[:, :-1] = labels[:, 1:]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # the sum over V loses too much in half precision
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none")
    return losses.view(targets.shape)[:, :-1]


def without_label(batch: Any) -> bool:
    """Whether a batch holds labels and all are -100, so that no loss can be computed from it.

    The first position of a sequence does not count: a causal model predicts no token there.
    """
    labels = [t for t in tensors_of(batch) if t.dim() > 0 and not t.is_floating_point() and t.dtype != torch.bool]
    return any(bool((t[:, 1:] if t.dim() > 1 and t.shape[1] > 1 else t).eq(IGNORE_INDEX).all()) for t in labels)
