"""A model to measure, with its tokenizer: from a folder, a checkpoint, a GGUF file, the hub, or an object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_prune.checkpoint_model import DTYPES, NO_TOKENIZER, quiet_transformers, read_model
from lightning_prune.checkpoints import open_checkpoint
from lightning_prune.inspection import Inspection, report_tensor
from lightning_prune.pretrained import load_pretrained
from lightning_prune.sources import existing_path, looks_like_path
from lightning_prune.tokenization import load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model, on the CPU and in evaluation mode unless it was given as an object.

    Attributes:
        source: What the user called it; the name of the class for an object.
        model: The transformers model.
        tokenizer: Its tokenizer, or None.
    """

    source: str
    model: Any
    tokenizer: PreTrainedTokenizerBase | None

    def inspection(self) -> Inspection:
        """Zeros and patterns of its weights, as `inspect` counts them in files."""
        model_type = getattr(self.model.config, "model_type", None)
        reports = [
            report_tensor(name, parameter.detach().cpu(), None, model_type=model_type)
            for name, parameter in self.model.named_parameters()
        ]
        return Inspection(self.source, "in memory", 0, reports)


def context_of(loaded: LoadedModel) -> int | None:
    """Most tokens that a model takes, as far as its configuration says."""
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def load_model(
    source: str | Path | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    argument: str = "model",
    progress: bool = True,
) -> LoadedModel:
    """Load a causal language model; nothing that comes with the files is run.

    Args:
        source: A transformers folder, a Lightning ``.ckpt`` or distributed checkpoint of `CausalLM`, a ``.gguf`` file,
            or a hub id; or a transformers model, which is taken as it is.
        tokenizer: Hub id, folder, ``.gguf`` file, ``tokenizer.json``, or a tokenizer. Default: the model's own.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default as stored.
        argument: What the caller's user calls `source`, for errors.
        progress: Show bars where stderr is a terminal.

    Raises:
        FileNotFoundError: a local path does not exist.
        ValueError: the files are damaged, are no causal language model, or lack weights; or an argument is wrong.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(map(repr, DTYPES))}")
    if isinstance(source, nn.Module):
        if dtype is not None:
            raise ValueError(f"dtype={dtype!r} is for models that are loaded; convert {argument} yourself")
        return LoadedModel(type(source).__name__, source, _tokenizer(tokenizer, None))
    name, wanted = str(source), None if dtype is None else DTYPES[dtype]
    path = existing_path(name, argument) if looks_like_path(name) else None
    if path is None or path.suffix.lower() == ".gguf":
        with quiet_transformers():
            model = load_pretrained(name, options={"dtype": wanted or (torch.float32 if path else "auto")})
        return LoadedModel(name, model.eval(), _tokenizer(tokenizer, name))
    given = tokenizer is not None and not isinstance(tokenizer, str)
    read = read_model(open_checkpoint(path, argument), NO_TOKENIZER if given else tokenizer, wanted, progress)
    return LoadedModel(name, _runnable(read.model).eval(), tokenizer if given else read.tokenizer)


def _runnable(model: Any) -> Any:
    """The model with the buffers that no file holds, such as rotary frequencies, which transformers computes."""
    if not any(buffer.is_meta for buffer in model.buffers()):
        return model
    dtype = torch.bool
    for parameter in model.parameters():
        dtype = torch.promote_types(dtype, parameter.dtype)  # one dtype, the one that loses nothing
    with quiet_transformers():
        return type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype)


def _tokenizer(tokenizer: str | PreTrainedTokenizerBase | None, default: str | None) -> PreTrainedTokenizerBase | None:
    if tokenizer is None and default is not None:
        tokenizer = default
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def device_of(device: str | None) -> torch.device:
    """The device that was asked for, else CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} is not there ({str(error).splitlines()[0]}); use 'cpu', or leave it out"
        ) from error
    return found


@contextmanager
def on(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Have a model on a device for the time of the block, and where it was afterwards."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
