"""The model card of an export: what was pruned, how, and what was measured, in the form the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_prune.checkpoint_model import ExportError, ReadModel
from lightning_prune.checkpoints import Checkpoint
from lightning_prune.evaluation_results import evaluation_tables
from lightning_prune.inspection import Inspection
from lightning_prune.sources import expanded, looks_like_path
from lightning_prune.tables import Table

CARD_FILE = "README.md"
"""Name of the card in the folder of the model."""

_LABELS = {
    "sparsity": "sparsity asked for",
    "group": "compared within",
    "allocation": "allocation of sparsity to layers",
    "update": "update of the remaining weights",
    "num_samples": "calibration samples",
    "sequential": "block by block",
    "schedule": "schedule",
    "seed": "seed",
}


def read_results(path: str | Path) -> Mapping[str, Any]:
    """The results of ``lightning-prune evaluate``, for a card.

    Raises:
        ExportError: the file cannot be read, or holds something else.
    """
    try:
        results = json.loads(expanded(path, "results").read_text(encoding="utf-8"))
        evaluation_tables(results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ExportError(
            f"results={str(path)!r} is no file that lightning-prune evaluate --output results.json has written "
            f"({type(error).__name__}: {error})"
        ) from error
    return dict(results)


def model_card(name: str, source: Checkpoint, read: ReadModel, results: Mapping[str, Any] | None = None) -> str:
    """The text of a model card.

    Args:
        name: Of the model.
        source: Where it was read from.
        read: The model, what is in its tensors, and the masks.
        results: What ``lightning-prune evaluate`` measured, from `read_results`.

    Returns:
        Markdown, with the metadata of the Hugging Face hub in front.
    """
    found = Inspection("", "", 0, read.reports)
    prunable, everything = found.totals(), found.totals(True)
    dense = prunable.zeros == 0
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = source.hyper_parameters.get("model")
    if isinstance(base, str) and base and not looks_like_path(base):
        head["base_model"] = base
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items())]
    lines += ["tags:", *(f"- {tag}" for tag in ([] if dense else ["pruned", "sparse"]) + ["lightning-prune"]), "---"]
    lines += ["", f"# {name}", ""]
    lines.append(
        f"A {type(read.model).__name__} of {everything.numel:,} parameters. {prunable.zeros:,} of the "
        f"{prunable.numel:,} weights in {prunable.tensors} layers outside embeddings and heads are exactly zero "
        f"({prunable.sparsity:.2%}; {everything.sparsity:.2%} of all parameters)."
    )
    if not dense:
        lines += ["", _pruning(read, found).markdown()]
    if results is not None:
        for table in evaluation_tables(results):
            lines += ["", table.markdown()]
    lines += ["", _USE.format(name=json.dumps(name)).strip()]
    if not dense:
        lines += ["", _limits(found)]
    return "\n".join(lines) + "\n"


def _pruning(read: ReadModel, found: Inspection) -> Table:
    rows = [("N:M pattern of every layer", found.pattern or "none (unstructured)")]
    if read.masks is not None:
        rows.insert(0, ("score", read.masks.score or "unknown"))
        for settings in read.masks.settings:
            rows += [(_LABELS[key], str(settings[key])) for key in _LABELS if settings.get(key) is not None]
        rows.append(("masks", f"{read.masks.count}; every weight they remove is zero in these files"))
    sparsities = [t.sparsity for t in found.selected()]
    rows.append(("sparsest and densest layer", f"{max(sparsities):.2%}, {min(sparsities):.2%}"))
    rows += [(package, _version(package)) for package in ("lightning-prune", "torch", "transformers")]
    return Table("Pruning", ("", ""), rows, ["`sparsity.json` has the figures of every layer."])


_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
```
"""


def _limits(found: Inspection) -> str:
    text = (
        "## Size and speed\n\nZeros are stored like other numbers: the files are as large as those of the dense model. "
    )
    if found.pattern == "2:4":
        return text + (
            "On NVIDIA GPUs since Ampere, 2:4 weights can be multiplied in sparse form "
            "(`torch.sparse.to_sparse_semi_structured`); elsewhere they run as fast as dense ones."
        )
    return text + "Matrix products skip no zeros at random places, so the model runs as fast as the dense one."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
