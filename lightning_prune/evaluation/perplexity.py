"""Perplexity of causal language models, weighted by tokens.

Letters: B windows in a batch, T tokens, V vocabulary.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune.errors import check_whole
from lightning_prune.progress import progress_bar
from lightning_prune.pruning.running import (
    IGNORE_INDEX,
    is_encoder_decoder,
    logits_of_tokens,
    next_token_labels,
    next_token_losses,
    unwrapped,
)
from lightning_prune.sharding import type_name


class NextTokenLoss(Metric):
    """Mean negative log-likelihood over all tokens seen, in nats, or its exponential.

    torchmetrics' own classes do not fit. `torchmetrics.text.Perplexity` takes the logarithm of a softmax,
    which is infinite for a token that underflows to zero probability, as happens in badly pruned models; and
    `MeanMetric` drops NaN values, or drops the weights. Here the losses come from a log-softmax, and a NaN
    shows.

    Args:
        perplexity: Return the perplexity, exp(mean), in place of the mean.
        kwargs: Arguments of `torchmetrics.Metric`.

    Examples:
        >>> metric = NextTokenLoss()
        >>> metric.update(torch.tensor([[1.0, 2.0, 0.0]]), 2)
        >>> metric.update(torch.tensor([[6.0]]), 1)
        >>> metric.compute()
        tensor(3.)
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    total: Tensor
    tokens: Tensor

    def __init__(self, perplexity: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.perplexity = perplexity
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor, tokens: int | Tensor) -> None:
        """Add the losses of one batch.

        Args:
            losses: Losses of single tokens, any shape, zero where nothing is predicted.
            tokens: Number of predicted tokens.
        """
        # not in place: the states may be inference tensors, after a validation before the training
        self.total = self.total + losses.detach().sum(dtype=self.total.dtype)
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Mean loss or perplexity of everything seen so far."""
        mean = self.total / self.tokens
        return mean.exp() if self.perplexity else mean


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp(nll).
        nll: Mean negative log-likelihood of a predicted token, in nats.
        tokens: Number of predicted tokens.
        seq_len: Longest window in tokens; the first token of a window is not predicted.
        windows: Number of windows.
    """

    perplexity: float
    nll: float
    tokens: int
    seq_len: int
    windows: int


def perplexity(
    model: nn.Module,
    data: Tensor | Sequence[Any],
    *,
    seq_len: int = 512,
    stride: int | None = None,
    first_token: int | None = None,
    max_windows: int | None = None,
    spread: bool = True,
    batch_size: int = 1,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of a causal language model on a token stream or on ready-made windows.

    A stream is cut into windows of `seq_len` tokens; a rest shorter than a window is left out. Every token
    counts the same. Sums are kept in float64. The train or eval mode of each module is restored afterwards.

    Args:
        model: Returns logits (B, T, V), or an object that has them as `.logits`: a transformers model or a
            `CausalLM`.
        data: Token ids as one stream, shape (T,) or (1, T), or as a list of integers; or a sequence of
            windows: a dataset whose items are tensors or lists, or dicts with "input_ids" (and
            "attention_mask": masked tokens are left out; "labels": tokens with -100 there are not predicted;
            and what else the model takes of each token, such as "position_ids": the first tokens of packed texts are
            not predicted), used as they are. Windows that predict nothing (padding alone, a single token) are left out.
        seq_len: Tokens in a window of a stream, at least 2.
        stride: Distance between the starts of windows. Default: windows do not overlap. With a
            smaller stride a window predicts only the tokens that no window before it has predicted.
        first_token: Of a stream: a token that every window begins with, so that it holds one less of the text. Models
            whose tokenizer puts one before every text expect it (Gemma, Llama: ``tokenizer.bos_token_id``).
        max_windows: Use at most this many windows. Default all.
        spread: Choose the `max_windows` windows evenly over the text, not from its beginning.
        batch_size: Windows in one forward pass.
        progress: Show a bar where stderr is a terminal.

    Returns:
        The perplexity with the counts it rests on.

    Raises:
        ValueError: If the model is an encoder-decoder, an argument is out of range, the text is shorter than one
            window, no window predicts a token, or windows hold inputs of the model that are not one value for each
            token.
    """
    if is_encoder_decoder(inner := unwrapped(model)):
        raise ValueError(
            f"model={type_name(inner)} is an encoder-decoder, which predicts other tokens than those of its input: "
            "give a causal language model, or take the mean loss of model(**batch) over pairs of texts."
        )
    windows, overlap = _windows(data, seq_len, stride, first_token)
    begin = [] if first_token is None else [first_token]
    if max_windows is not None:
        check_whole("max_windows", max_windows, hint=", or None for all windows")
    check_whole("batch_size", batch_size)
    count = min(len(windows), max_windows or len(windows))
    chosen = [i * len(windows) // count if spread else i for i in range(count)]
    metric = NextTokenLoss()
    metric.set_dtype(torch.float64)
    device = next(model.parameters()).device
    longest = used = 0
    taken, tokens_known = _inputs_of(model), _vocabulary(model)
    bar = progress_bar("Perplexity", math.ceil(count / batch_size), enabled=progress)
    with evaluating(model), torch.no_grad(), bar as advance:
        for start in range(0, count, batch_size):
            rows = _rows(windows, chosen[start : start + batch_size], overlap, begin, taken)
            advance()
            if not rows:
                continue
            padded = _padded(rows)
            _check_tokens(padded["input_ids"], tokens_known)
            inputs = {name: part.to(device) for name, part in padded.items()}
            labels = inputs.pop("labels")
            losses = next_token_losses(_logits(model, **inputs), labels)
            # float64 does not exist on every accelerator: add up on the CPU
            metric.update(losses.cpu(), int((labels[:, 1:] != IGNORE_INDEX).sum()))
            longest, used = max(longest, labels.shape[1]), used + len(rows)
    if not used:
        raise ValueError(
            f"data: none of its {count} window(s) predicts a token. Pass windows with at least two tokens that are "
            "neither masked nor labelled -100."
        )
    nll, tokens = float(metric.compute()), int(metric.tokens.item())
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 700 else nll * math.inf,  # math.exp raises where torch says inf
        nll=nll,
        tokens=tokens,
        seq_len=longest,
        windows=used,
    )


def _windows(
    data: Tensor | Sequence[Any], seq_len: int, stride: int | None, first_token: int | None
) -> tuple[Any, int]:
    """The text of the windows, and how many tokens of it are context in all but the first, which is not predicted."""
    stream = _as_stream(data)
    if stream is None:
        for name, value in (("stride", stride), ("first_token", first_token)):
            if value is not None:
                raise ValueError(f"{name}={value} needs a token stream; the data is a sequence of windows.")
        if len(data) == 0:
            raise ValueError("data is an empty sequence of windows. Pass at least one window.")
        return data, 0
    check_whole("seq_len", seq_len, least=2, hint=": the first token of a window is not predicted")
    if first_token is not None:
        check_whole("first_token", first_token, least=0)
    own = seq_len if first_token is None else seq_len - 1
    step = own if stride is None else stride
    bound = f"at most seq_len={seq_len}" if first_token is None else f"at most {own}, the tokens of text in a window"
    check_whole("stride", step, hint=f" and {bound}")
    if step > own:
        raise ValueError(f"stride={stride} must be {bound}")
    if len(stream) < own:
        raise ValueError(
            f"data has {len(stream)} tokens, fewer than one window of seq_len={seq_len}. Pass a smaller "
            "seq_len or more text."
        )
    return stream.unfold(0, own, step), own - step  # views


def _as_stream(data: Tensor | Sequence[Any]) -> Tensor | None:
    """The data as one stream of shape (T,), or None when it is a sequence of windows."""
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.ndim not in (1, 2):
            raise ValueError(
                f"data must hold integer token ids of shape (T,) or (N, T); received {data.dtype} of shape "
                f"{tuple(data.shape)}."
            )
        if data.ndim == 1:
            return data
        return data[0] if len(data) == 1 else None
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, (str, Mapping)):
        raise ValueError(
            f"data must be a tensor, a list of token ids or a dataset with a length; received "
            f"{type(data).__name__}. Tokenize text first, e.g. tokenizer(text)['input_ids']."
        )
    if len(data) and isinstance(data[0], int):
        return torch.as_tensor(data)
    return None


def _language_models(model: nn.Module) -> list[Any]:
    """The models of transformers that a model holds or is, such as that in a CausalLM; any other as it is."""
    return [m for m in model.modules() if hasattr(m, "get_output_embeddings")] or [model]


def _vocabulary(model: nn.Module) -> int | None:
    """The number of tokens that a model has embeddings of, where it says so; of several models in one the most."""
    known = []
    for part in _language_models(model):
        with suppress(NotImplementedError, AttributeError):  # of families whose embeddings transformers does not find
            known.append(getattr(getattr(part, "get_input_embeddings", lambda: None)(), "num_embeddings", None))
    return max((number for number in known if number is not None), default=None)


def _check_tokens(ids: Tensor, known: int | None) -> None:
    """Refuse tokens that a model does not know: some devices end the process there."""
    if known is not None and not bool(((ids >= 0) & (ids < known)).all()):
        strange = int(ids[(ids < 0) | (ids >= known)][0])
        raise ValueError(
            f"data has the token {strange}, and the model has embeddings of the tokens 0 to {known - 1}. Tokenize "
            "with the model's own tokenizer."
        )


def _inputs_of(model: nn.Module) -> frozenset[str]:
    """What a model takes of a window beside tokens, labels and their mask, by the names in its forward pass."""
    inner = unwrapped(model)
    parameters = inspect.signature(inner.forward).parameters
    names = {*parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # which it hands on
        names |= {*_PACKED, *inspect.signature(type(_language_models(inner)[0]).forward).parameters}
    return frozenset(names - {"input_ids", "labels", "attention_mask"})


# Where packed texts begin: models hand it on to their attention without naming it.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")


def _window(item: Any, index: int, taken: frozenset[str]) -> dict[str, Tensor]:
    """Token ids and labels (T,) of one item of a dataset, and what else a model takes, without the masked ones."""
    fields = item if isinstance(item, Mapping) else {"input_ids": item}
    try:
        ids = torch.as_tensor(fields["input_ids"])
        labels = torch.as_tensor(fields.get("labels", ids))
        real = torch.as_tensor(fields.get("attention_mask", torch.ones_like(ids)))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data[{index}] must hold token ids, or be a dict with 'input_ids'; received {item!r:.60} ({error}). "
            "Tokenize text first, e.g. tokenizer(text)['input_ids']."
        ) from error
    if ids.ndim != 1 or (len(ids) and ids.is_floating_point()) or not ids.shape == labels.shape == real.shape:
        raise ValueError(
            f"data[{index}] must hold integer token ids of shape (T,), and labels and attention_mask of that shape; "
            f"received {ids.dtype} of shape {tuple(ids.shape)}, labels {tuple(labels.shape)}, attention_mask "
            f"{tuple(real.shape)}."
        )
    row = {"input_ids": ids[real.bool()].long(), "labels": labels[real.bool()].long()}
    for name in sorted(taken & fields.keys()):
        if (value := fields[name]) is not None:
            part = torch.as_tensor(value)
            if part.shape != ids.shape:
                raise ValueError(
                    f"data[{index}] has {name!r} of shape {tuple(part.shape)}, which the model takes, and which is not "
                    f"one value for each of the {len(ids)} tokens. Take it out of the windows, or measure with "
                    "validation_step of a LightningModule (CausalLM)."
                )
            row[name] = part[real.bool()]
    if "position_ids" in row:  # of packed texts
        row["labels"] = next_token_labels({name: part[None] for name, part in row.items()})[0]
    return row


def _rows(
    windows: Sequence[Any], chosen: Sequence[int], overlap: int, begin: Sequence[int], taken: frozenset[str]
) -> list[dict[str, Tensor]]:
    """Inputs and labels of the windows that predict a token, after the tokens that each begins with."""
    rows = []
    for index in chosen:
        row = _window(windows[index], index, taken)
        row["labels"] = row["labels"].clone()
        row["labels"][: overlap if index else 0] = IGNORE_INDEX
        if begin:  # of a stream, which has ids alone
            row = {name: torch.cat([part.new_tensor(begin), part]) for name, part in row.items()}
        if bool((row["labels"][1:] != IGNORE_INDEX).any()):
            rows.append(row)
    return rows


def _padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs and labels of shape (B, T), padded on the right, which a causal model cannot see from the left."""
    padded = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] if name in row else _default(name, len(row["input_ids"])) for row in rows]
        fill = IGNORE_INDEX if name == "labels" else 0
        padded[name] = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
    return padded


def _default(name: str, tokens: int) -> Tensor:
    """What a model takes a row for that does not name an input which others of its batch do."""
    return torch.arange(tokens) if name == "position_ids" else torch.zeros(tokens, dtype=torch.long)


def _logits(model: nn.Module, input_ids: Tensor, **others: Tensor) -> Tensor:
    # a cache of keys and values would only cost memory here
    if "use_cache" in inspect.signature(model.forward).parameters:
        output = model(input_ids, use_cache=False, **others)
    else:
        output = model(input_ids, **others)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits_of_tokens(model, logits, input_ids)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
