"""Perplexity on texts and zero-shot tasks of a model, with the dense one beside it."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_prune.checkpoints.model import LoadedModel, context_of, device_of, load_model, on
from lightning_prune.checkpoints.sources import existing_path, first_token
from lightning_prune.errors import check_whole
from lightning_prune.evaluation.perplexity import perplexity
from lightning_prune.evaluation.tasks import check_lm_eval, read_tasks, zero_shot
from lightning_prune.history import versions
from lightning_prune.results import EvaluationResults, ModelResult, TextResult

_WINDOW = 512  # tokens, where the models take as many
_PACKAGES = ("lightning-prune", "torch", "transformers", "tokenizers", "lm-eval")


def evaluate(
    model: str | Path | PreTrainedModel,
    text: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    *,
    baseline: str | Path | PreTrainedModel | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> EvaluationResults:
    """Measure perplexity and zero-shot tasks.

    A text is one stream of tokens, cut into windows. Each window begins with the token that the tokenizer puts before
    every text, if it does that (Gemma, Llama); there are no other special tokens. Everything is read and checked, and
    both models loaded into main memory, before the first is run.

    Args:
        model: A transformers folder, a Lightning ``.ckpt`` or distributed checkpoint of `CausalLM`, a ``.gguf`` file,
            a hub id, or a transformers model.
        text: Text files (UTF-8).
        tasks: Tasks for lm-eval: names, ``.jsonl`` files or folders of them; see `lightning_prune.evaluation.tasks`.
        baseline: A model to measure beside it in the same way, as a rule the dense one.
        tokenizer: Hub id, folder, ``.gguf`` file, ``tokenizer.json``, or a tokenizer; default each model's own.
        seq_len: Tokens in a window of text; its first one is not predicted. Default 512, or as many as the models take.
        stride: Tokens of text between the starts of windows; default: no overlap.
        max_windows: Use at most so many windows of each text, spread evenly. Default all.
        limit: Use at most so many samples of each task. Default all.
        batch_size: Windows or sequences in one forward pass.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default as stored.
        device: Such as ``"cuda"``; default CUDA where there is one.
        progress: Show bars where stderr is a terminal.

    Returns:
        The results: plain values, and tables.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: there is nothing to measure, an argument is out of range, a file is damaged or no task, a text is
            shorter than a window, lm-eval is not installed, a model has no tokenizer, or the two models' tokenizers
            differ, so that their perplexities cannot be compared, or give tokens that a model does not have.

    Example::

        results = evaluate("pruned", text=["valid.txt"], tasks=["blimp:blimp"], baseline="HuggingFaceTB/SmolLM2-135M")
        print(results.tables()[0].markdown())
    """
    started = time.monotonic()
    if isinstance(text, (str, Path)) or isinstance(tasks, str):
        raise ValueError(f"text={text!r} and tasks={tasks!r}: both take a list, also of one (text=['valid.txt'])")
    if not text and not tasks:
        raise ValueError("there is nothing to measure: give text (--text FILE) or tasks (--tasks NAME)")
    least = {"seq_len": 2, "stride": 1, "max_windows": 1, "limit": 1, "batch_size": 1}
    asked = {"seq_len": seq_len, "stride": stride, "max_windows": max_windows, "limit": limit, "batch_size": batch_size}
    for name, value in asked.items():
        if value is not None:
            check_whole(name, value, least[name])
            used, of = (tasks, "tasks") if name == "limit" else (text or name == "batch_size", "text")
            if not used:
                raise ValueError(f"{name}={value} is of {of}, and there is none to measure: give {of}, or leave it out")
    if tasks:
        check_lm_eval()
        read_tasks(tasks)
    texts = {str(file): _read_text(file) for file in text}
    place = device_of(device)
    sources = [("baseline", baseline), ("model", model)] if baseline is not None else [("model", model)]
    models = [load_model(source, tokenizer, dtype, role, progress) for role, source in sources if source is not None]
    if seq_len is None:
        seq_len = min(_WINDOW, *(context_of(loaded) or _WINDOW for loaded in models))
    begin, streams = _streams(models, texts, seq_len)
    own = seq_len if begin is None else seq_len - 1
    if stride is not None and stride > own:
        raise ValueError(
            f"stride={stride} must not be above {own}, the tokens of text in a window of seq_len={seq_len}: tokens "
            "between windows would be lost"
        )
    measured, shown = [], _short_names(texts)
    for (role, _), loaded in zip(sources, models, strict=True):
        facts = loaded.facts()
        with on(place, loaded.model):
            of_texts = []
            for name, content in texts.items():
                windows: Any = {"seq_len": seq_len, "stride": stride, "first_token": begin, "max_windows": max_windows}
                found = perplexity(loaded.model, streams[name], **windows, batch_size=batch_size, progress=progress)
                digest = hashlib.sha256(content.encode()).hexdigest()
                of_texts.append(TextResult(shown[name], digest, stride=stride or own, **asdict(found)))
            assert loaded.tokenizer is not None
            options: Any = {"batch_size": batch_size, "limit": limit, "progress": progress}
            of_tasks = zero_shot(loaded.model, loaded.tokenizer, tasks, **options) if tasks else []
        measured.append(ModelResult(loaded.source, role, **facts, texts=of_texts, tasks=of_tasks))
        gc.collect()
    settings = {**asked, "seq_len": seq_len, "stride": stride or own, "first_token": begin, "tasks": list(tasks)}
    return EvaluationResults(measured, settings, versions(_PACKAGES), str(place), time.monotonic() - started)


def _short_names(files: Iterable[str]) -> dict[str, str]:
    """Names of files by their paths, with as many of the folders around them as tell them apart."""
    parts = {file: Path(file).absolute().parts for file in files}
    depth = 1
    while len({own[-depth:] for own in parts.values()}) < len(set(parts.values())):
        depth += 1
    return {file: "/".join(own[-depth:]) for file, own in parts.items()}


def _read_text(file: str | Path) -> str:
    path = existing_path(str(file), "text", on_hub=False)
    if path.is_dir():
        raise ValueError(f"text={str(file)!r} is a folder; name its files")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text={str(file)!r} is not UTF-8 text: {error}; convert it, such as with: iconv -f LATIN1 -t UTF-8 (or "
            "-f UTF-16)"
        ) from error
    if "\0" in content:
        raise ValueError(
            f"text={str(file)!r} holds zero bytes, so it is no text in UTF-8; if it is UTF-16, convert it: iconv -f "
            "UTF-16 -t UTF-8"
        )
    if not content.strip():
        raise ValueError(f"text={str(file)!r} is empty; give a file with text")
    return content


def _streams(
    models: Sequence[LoadedModel], texts: dict[str, str], seq_len: int
) -> tuple[int | None, dict[str, torch.Tensor]]:
    """The token that windows begin with, and the ids [T] of each text: the same for all models."""
    for loaded in models:
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.source} has no tokenizer; give one (--tokenizer)")
        context = context_of(loaded)
        if texts and context is not None and seq_len > context:
            raise ValueError(
                f"seq_len={seq_len} is longer than the {context} tokens that {loaded.source} takes; give at most as "
                "many (--seq_len)"
            )
    begins = [first_token(loaded.tokenizer) for loaded in models if loaded.tokenizer is not None] if texts else [None]
    streams = {}
    for name, content in texts.items():
        # verbose=False: the stream is cut into windows, so it is not too long
        ids, *others = [_ids(loaded.tokenizer, content) for loaded in models]
        if any(other != ids for other in others) or len(set(begins)) > 1:
            raise ValueError(
                f"text={name!r} has other tokens for {models[0].source} than for {models[1].source}, so that their "
                "perplexities cannot be compared; give one tokenizer for both (--tokenizer), or no baseline"
            )
        if len(ids) < seq_len - (begins[0] is not None):
            raise ValueError(
                f"text={name!r} has {len(ids)} tokens, fewer than one window of seq_len={seq_len}; give more text, or "
                "a smaller seq_len (--seq_len)"
            )
        for loaded in models:
            rows = loaded.model.get_input_embeddings().weight.shape[0]
            if (highest := max(begins[0] or 0, max(ids))) >= rows:
                raise ValueError(
                    f"text={name!r} has the token {highest}, but {loaded.source} has embeddings of {rows} tokens: the "
                    "tokenizer is another model's; give the right one (--tokenizer)"
                )
        streams[name] = torch.tensor(ids)
    return begins[0], streams


def _ids(tokenizer: Any, content: str) -> list[int]:
    return list(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
