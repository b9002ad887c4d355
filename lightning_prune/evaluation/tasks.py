"""Measure zero-shot accuracy through lm-eval, on its own tasks and on local files."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import io
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_prune.checkpoints.sources import existing_path
from lightning_prune.errors import check_whole, first_line
from lightning_prune.evaluation.perplexity import evaluating
from lightning_prune.results import TaskResult
from lightning_prune.safety import expanded


def check_lm_eval() -> None:
    """Refuse to go on without lm-eval, before anything long begins.

    Raises:
        ValueError: it is not installed.
    """
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"tasks need the package lm-eval, of which {', '.join(missing)} is not installed: "
            "pip install 'lightning-prune[eval]'"
        )


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = True,
) -> list[TaskResult]:
    """Measure a causal language model on tasks with lm-eval, without examples in the prompt unless a task has its own.

    Mode of the model, tokenizer and random states are as before afterwards. Probabilities are taken in float32.

    Args:
        model: A transformers model, on the device to use.
        tokenizer: Its tokenizer.
        tasks: See `lightning_prune.evaluation.tasks.read_tasks`.
        batch_size: Sequences in one forward pass.
        limit: Use only so many samples of each task, the first ones. Default all.
        progress: Show lm-eval's bars where stderr is a terminal.

    Returns:
        Metrics in the order of the tasks; of a folder, and of lm-eval's groups, also the mean over its tasks.

    Raises:
        ValueError: lm-eval is not installed, a task is unknown, its data cannot be had, a local sample is longer than
            the model's context, or the model's probabilities are NaN.
    """
    check_whole("batch_size", batch_size)
    if limit is not None:
        check_whole("limit", limit, hint=", or None for all samples")
    check_lm_eval()
    local, names = read_tasks(tasks)
    if not local and not names:
        return []
    with _quiet(progress), evaluating(model):
        lm = _language_model(model, copy.deepcopy(tokenizer), batch_size)
        _check_lengths(lm, local)
        loaded = _load(local, names)
        from lm_eval import evaluate

        found: Any = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
    return _results_of(local, found)


def _language_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):  # type: ignore[misc, unused-ignore]
        """A model whose NaN do not pass for the first choice, as the largest of NaN is to numpy."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            wrong = sum(math.isnan(answer[0]) for answer in answers)
            if wrong:
                raise ValueError(
                    f"model: {wrong} of {len(answers)} log-probabilities are NaN, so that tasks cannot be scored; look "
                    "at its weights with lightning-prune inspect, or evaluate it in float32"
                )
            return answers

    return Checked(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def _check_lengths(lm: Any, local: Iterable[LocalTask]) -> None:
    for task in local:
        for number, document in enumerate(task.documents):
            longest = max(len(lm.tok_encode(f"{document['query']} {choice}")) for choice in document["choices"])
            if longest > lm.max_length:
                raise ValueError(
                    f"tasks={task.name!r}: sample {number} has {longest} tokens, more than the {lm.max_length} the "
                    "model takes; it would be cut. Leave the task out"
                )


def _load(local: Sequence[LocalTask], names: Sequence[str]) -> Any:
    """lm-eval's tasks, with those of files among them."""
    manager = _task_manager(bool(names))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else "; lm-eval ls tasks lists them all"
            raise ValueError(f"tasks={name!r} is no task of lm-eval{hint}")
    try:
        loaded = manager.load([*map(_definition, local), *names])
    except (OSError, ConnectionError, ValueError, ImportError) as error:
        raise ValueError(
            f"tasks: lm-eval cannot load the data of {', '.join(names) or 'the files'}: {first_line(error)}; its "
            "tasks come from the hub, .jsonl files need no network"
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default
    return loaded


@functools.cache
def _task_manager(with_own_tasks: bool) -> Any:
    """lm-eval's index of tasks; of the thousands of its own it takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_own_tasks)


def _definition(task: LocalTask) -> dict[str, Any]:
    """As lm-eval's own task ``blimp``: no context, a space, the sentence; the first token follows the BOS token."""
    import datasets

    return {
        "task": task.name,
        "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(task.documents)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in task.metrics],
    }


def _results_of(local: Sequence[LocalTask], found: Mapping[str, Any]) -> list[TaskResult]:
    """Metrics of files, means over the files of a folder, and metrics of lm-eval's tasks and groups, in this order."""
    groups = found.get("groups") or {}
    of = {name: _metrics(name, found, name in groups) for name in found["results"]}
    results = [result for task in local for result in of.pop(task.name)]
    for group in dict.fromkeys(task.group for task in local if task.group):
        members = [r for r in results if r.task in {task.name for task in local if task.group == group}]
        for metric in dict.fromkeys(r.metric for r in members):
            results.append(_mean(group, metric, [r for r in members if r.metric == metric]))
    return results + [result for metrics in of.values() for result in metrics]


def _mean(group: str, metric: str, tasks: Sequence[TaskResult]) -> TaskResult:
    """The mean over tasks, each with the same weight; its error is that of a sum of independent means."""
    errors = [task.stderr for task in tasks if task.stderr is not None]
    stderr = math.sqrt(sum(e * e for e in errors)) / len(tasks) if len(errors) == len(tasks) else None
    value = sum(task.value for task in tasks) / len(tasks)
    return TaskResult(group, metric, value, stderr, sum(task.samples for task in tasks), group=True)


def _metrics(name: str, found: Mapping[str, Any], group: bool) -> list[TaskResult]:
    """lm-eval names metrics ``metric,filter``, and their errors ``metric_stderr,filter``."""
    values, counts = found["results"][name], found.get("n-samples", {})
    members = found.get("group_subtasks", {}).get(name) or [name]
    samples = sum(int(counts[member]["effective"]) for member in members if member in counts)
    results = []
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric} ({kind})"
        error = float(stderr) if isinstance(stderr, (int, float)) and not math.isnan(stderr) else None
        results.append(TaskResult(name, label, float(value), error, samples, group))
    return results


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without lm-eval's remarks; without its bars where nobody can see them."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    hidden = contextlib.nullcontext() if progress and sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with hidden:
            yield
    finally:
        logger.setLevel(level)


PREFIX = "blimp:"
"""May stand before a file or folder of minimal pairs, to say what it must be."""


@dataclass(frozen=True)
class LocalTask:
    """A task from a file.

    Attributes:
        name: Stem of the file.
        group: Name of the folder it is one file of, or None.
        documents: One mapping with ``query``, ``choices`` and ``gold`` a sample.
        metrics: Names of lm-eval's metrics.
    """

    name: str
    group: str | None
    documents: list[dict[str, Any]]
    metrics: tuple[str, ...]


def read_tasks(specs: Sequence[str]) -> tuple[list[LocalTask], list[str]]:
    """Sort what the user asked for into local files, which are read and checked, and names of lm-eval's tasks.

    Args:
        specs: Names of tasks of lm-eval, ``.jsonl`` files, or folders of them; ``blimp:PATH`` for minimal pairs.

    Raises:
        ValueError: a file is no task; the message says which line, and what it lacks.
        FileNotFoundError: a path does not exist.
    """
    local: list[LocalTask] = []
    names: list[str] = []
    for spec in specs:
        path = expanded(spec.removeprefix(PREFIX), "tasks")
        if spec.startswith(PREFIX) or path.suffix == ".jsonl" or path.is_dir() or "/" in spec:
            local += _read_path(existing_path(str(path), "tasks", on_hub=False), pairs_only=spec.startswith(PREFIX))
        elif path.suffix in (".yaml", ".yml", ".json", ".py") or (path.suffix and path.is_file()):
            raise ValueError(
                f"tasks={spec!r}: local tasks are .jsonl files; definitions may name code, and are not read"
            )
        else:
            names.append(spec)
    seen = [*(task.name for task in local), *names]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {twice[0]!r} is named twice; name each task once")
    return local, names


def _read_path(path: Path, pairs_only: bool) -> list[LocalTask]:
    if not path.is_dir():
        return [_read_file(path, None, pairs_only)]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(
            f"tasks={str(path)!r} is a folder without .jsonl files; give such a file, or the folder that holds them"
        )
    return [_read_file(file, path.resolve().name, pairs_only) for file in files]


def _read_file(path: Path, group: str | None, pairs_only: bool) -> LocalTask:
    documents: list[dict[str, Any]] = []
    kinds = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"tasks={str(path)!r} is not UTF-8 text: {error}; convert it (iconv -f LATIN1 -t UTF-8)"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tasks={str(path)!r}, line {number} is not JSON: {error}") from error
        document = _document(fields, len(documents), pairs_only)
        if document is None:
            wanted = "non-empty texts 'sentence_good' and 'sentence_bad'"
            other = "" if pairs_only else ", or 'query', at least two 'choices', and the index 'gold' of one"
            raise ValueError(f"tasks={str(path)!r}, line {number} must have {wanted}{other}")
        kinds.add("sentence_good" in fields)
        documents.append(document)
    if not documents:
        raise ValueError(f"tasks={str(path)!r} holds no samples; give lines of minimal pairs or multiple choice")
    if len(kinds) > 1:
        raise ValueError(f"tasks={str(path)!r} mixes minimal pairs and multiple choice; make two files of it")
    return LocalTask(path.stem, group, documents, ("acc",) if kinds == {True} else ("acc", "acc_norm"))


def _document(fields: Any, index: int, pairs_only: bool) -> dict[str, Any] | None:
    """A sample in the form of the task below, or None if it is none."""
    if not isinstance(fields, Mapping):
        return None
    good, bad = fields.get("sentence_good"), fields.get("sentence_bad")
    if _is_text(good) and _is_text(bad):
        # lm-eval takes the first of equal choices. The good one stands first in every other sample only, so that a
        # model that gives everything the same probability is right half of the time.
        return {"query": "", "choices": [good, bad] if index % 2 == 0 else [bad, good], "gold": index % 2}
    query, choices, gold = fields.get("query"), fields.get("choices"), fields.get("gold")
    if pairs_only or not isinstance(query, str) or not isinstance(choices, list) or len(choices) < 2:
        return None
    if not all(map(_is_text, choices)) or type(gold) is not int or not 0 <= gold < len(choices):
        return None
    return {"query": query, "choices": choices, "gold": gold}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
