"""Per-sample losses of causal language models.

Pruning scores need one gradient a sample, so the losses here are not averaged over the batch.

Letters: B samples, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def causal_lm_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Mean next-token cross-entropy of each sample.

    The shift is done here: the logits at position t are compared with the label at position t + 1; `labels`
    is `input_ids` with ignored positions replaced by `ignore_index`.

    Args:
        logits: Scores of shape (B, T, V), any floating dtype; the loss is computed in float32
            (float64 stays as it is).
        labels: Token ids of shape (B, T).
        ignore_index: Label that is not predicted (padding, prompts).

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
