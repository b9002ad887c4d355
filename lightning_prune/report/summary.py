"""What is known of how a model was made, gathered from wherever it was left, in groups of plain lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_prune.report.sources import Source, nested

Facts = dict[str, dict[str, str]]

_LONGEST = 240
_ARCHITECTURE = (
    *("model_type", "hidden_size", "n_embd", "intermediate_size", "num_hidden_layers", "n_layer"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "torch_dtype", "dtype"),
)
_TRAINING = (
    *("strategy", "accelerator", "processes", "devices", "precision", "max_steps", "accumulate_grad_batches"),
    "gradient_clip_val",
)
_DATA = (
    *("source", "name", "split", "revision", "validation", "validation_share", "tokenizer", "block_size", "batch_size"),
    "seed",
)
_MODEL = ("model", "gguf_file", "revision", "learning_rate", "weight_decay", "lr_schedule", "warmup_ratio")


def summarize(source: Source) -> Facts:
    """Facts by group: method, model, training, data, versions. Only what is known; the run's own words come first."""
    run, checkpoint = source.history.run, source.checkpoint
    facts: Facts = {}
    for callback in _callbacks(source):
        title = facts.setdefault(f"Method: {callback[0]}", {})
        title |= _lines(callback[1].items())
    scores = [str(s["score"]) for s in _states(source) if s.get("score")]
    if not facts and scores:
        patterns = [str(s["pattern"]) for s in _states(source) if s.get("pattern")]
        facts["Method"] = {"score": ", ".join(scores), **({"pattern": ", ".join(patterns)} if patterns else {})}
    if not facts and source.sparsity:
        facts["Method"] = _lines((k, source.sparsity.get(k)) for k in ("score", "pattern"))
    hyper = source.hparams or checkpoint.hyper_parameters
    config = checkpoint.config
    facts["Model"] = _lines((k, config.get(k)) for k in _ARCHITECTURE) | _lines((k, hyper.get(k)) for k in _MODEL)
    trainer = nested(source.config, "trainer") or {}
    training = {k: run.get(k, trainer.get(k)) for k in _TRAINING}
    seed = run.get("seed")
    seed = source.config.get("seed_everything") if seed is None else seed
    progress = [(k, checkpoint.progress.get(k)) for k in ("epoch", "global_step")]
    facts["Training"] = _lines([("seed", seed), *progress, *training.items()])
    facts["Data"] = _data(source)
    versions = run.get("versions")
    found = dict(versions) if isinstance(versions, Mapping) else {}
    found.setdefault("lightning", checkpoint.progress.get("lightning"))
    found.setdefault("transformers", config.get("transformers_version"))
    facts["Versions"] = _lines(found.items())
    return {title: lines for title, lines in facts.items() if lines}


def _states(source: Source) -> list[Mapping[str, Any]]:
    callbacks = source.checkpoint.callbacks.items()
    return [s for k, s in callbacks if str(k).startswith("WeightPruning") and isinstance(s, Mapping)]


def _callbacks(source: Source) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and settings of the callbacks that pruned or retrained, from the history or the command line's file."""
    told = source.history.run.get("callbacks")
    if isinstance(told, list) and told:
        named = [(c.get("name"), c.get("settings")) for c in told if isinstance(c, Mapping)]
    else:
        listed = nested(source.config, "trainer", "callbacks")
        listed = listed if isinstance(listed, list) else []
        named = [(c.get("class_path"), c.get("init_args")) for c in listed if isinstance(c, Mapping)]
        named = [(n, s) for n, s in named if isinstance(n, str) and n.startswith("lightning_prune")]
    return [
        (str(name).rsplit(".", 1)[-1], settings)
        for name, settings in named
        if isinstance(settings, Mapping) and "SparsityMonitor" not in str(name)
    ]


def _data(source: Source) -> dict[str, str]:
    settings = nested(source.history.run, "data", "settings") or nested(source.config, "data", "init_args")
    settings = settings or source.checkpoint.data_hyper_parameters
    if not isinstance(settings, Mapping):
        return {}
    found = _lines((k, settings.get(k)) for k in _DATA)
    if found and not settings.get("revision"):
        found["revision"] = "not pinned"
    return found


def _lines(pairs: Iterable[tuple[str, Any]]) -> dict[str, str]:
    return {str(key): text(value) for key, value in pairs if value is not None and value != {} and value != []}


def text(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, float):
        written = f"{value:g}"
    elif isinstance(value, (Mapping, list, tuple)):
        written = json.dumps(value, default=str)
    else:
        written = str(value)
    return written if len(written) <= _LONGEST else written[: _LONGEST - 1] + "…"
