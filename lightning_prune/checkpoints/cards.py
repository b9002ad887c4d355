"""Describe a model beside its weights: a card for people, and `sparsity.json` for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.checkpoints.inspection import Inspection, TensorReport
from lightning_prune.checkpoints.sources import looks_like_path
from lightning_prune.history import versions
from lightning_prune.naming import is_head
from lightning_prune.pruning.coverage import FEW_ZEROS
from lightning_prune.results import Table

CARD_FILE = "README.md"
"""Name of the card in the folder of the model."""

SPARSITY_FILE = "sparsity.json"
"""Name of the file that says which layers are how sparse, and which score chose the zeros."""

_LABELS = {
    "targets": "layers chosen",
    "ignore": "layers left out",
    "sparsity": "sparsity asked for",
    "group": "compared within",
    "allocation": "allocation of sparsity to layers",
    "update": "update of the remaining weights",
    "num_samples": "calibration samples",
    "sequential": "block by block",
    "schedule": "schedule",
    "seed": "seed",
}


@dataclass(frozen=True)
class Making:
    """How a model came about, as far as it is known.

    Attributes:
        score: Name of the score that chose the zeros.
        settings: Settings of each pruning, in plain values.
        masks: Number of masks that the zeros were compared with, or None.
        sizes: Of a model that was shrunk: names of sizes to what they were before and are now.
        base: The model that was pruned, such as a hub id; a path of this machine is not told.
        tables: Figures that were measured.
    """

    score: str | None = None
    settings: Sequence[Mapping[str, Any]] = ()
    masks: int | None = None
    sizes: Mapping[str, tuple[int, int]] | None = None
    base: Any = None
    tables: Sequence[Table] = ()


def described_files(name: str, model: Any, found: Inspection, making: Making) -> dict[str, str]:
    """Return the card and `sparsity.json` of a model by the names of their files."""
    return {CARD_FILE: model_card(name, model, found, making), SPARSITY_FILE: _sparsity(found, making)}


def pruned_besides(found: Inspection, making: Making) -> list[TensorReport]:
    """List what is pruned of the tensors that no sum of prunable weights counts, such as an output layer."""
    others = [t for t in found.selected(True) if not t.prunable and len(t.shape) > 1]
    if found.masks is not None:
        return [t for t in others if t.mask is not None and t.mask.masked]
    # Masks were there, and are not told of by name.
    return [t for t in others if making.masks is not None and is_head(t.name) and t.sparsity > FEW_ZEROS]


def besides_line(besides: Sequence[TensorReport]) -> str:
    """Say of `pruned_besides` how much of each is zero."""
    return ", ".join(f"{t.zeros:,} of the {t.numel:,} weights of {t.name} ({t.sparsity:.2%})" for t in besides)


def _sparsity(found: Inspection, making: Making) -> str:
    content: dict[str, Any] = {
        "score": making.score,
        "settings": list(making.settings),
        "pattern": found.pattern,
        "weights": found.totals().numel,
        "zeros": found.totals().zeros,
        "sparsity": found.sparsity,
        "layers": {
            t.name: {"weights": t.numel, "zeros": t.zeros, "sparsity": t.sparsity, "pattern": t.pattern}
            for t in [*found.selected(), *pruned_besides(found, making)]
        },
    }
    if making.sizes is not None:
        content["sizes"] = {name: {"before": before, "now": now} for name, (before, now) in making.sizes.items()}
    return json.dumps(content, indent=2) + "\n"


def model_card(name: str, model: Any, found: Inspection, making: Making) -> str:
    """Return the text of a model card: Markdown, with the metadata of the Hugging Face hub in front."""
    prunable, everything = found.totals(), found.totals(True)
    besides = pruned_besides(found, making)
    pruned, shrunk = prunable.zeros > 0 or bool(besides), making.sizes is not None
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if isinstance(making.base, str) and making.base and not looks_like_path(making.base):
        head["base_model"] = making.base
    tags = (["pruned"] if pruned or shrunk else []) + (["sparse"] if pruned else []) + ["lightning-prune"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items())]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {name}", ""]
    lines.append(
        f"A {type(model).__name__} of {everything.numel:,} parameters. {prunable.zeros:,} of the "
        f"{prunable.numel:,} weights in {prunable.tensors} layers outside embeddings and heads are exactly zero "
        f"({prunable.sparsity:.2%}; {everything.sparsity:.2%} of all parameters)."
        + (f" Besides these: {besides_line(besides)}." if besides else "")
    )
    tables = [_shrinking(making)] if shrunk else []
    tables += [_pruning(found, making)] if pruned and (making.masks is not None or not shrunk) else []
    for table in [*tables, *making.tables]:
        lines += ["", table.markdown()]
    lines += ["", _USE.format(name=json.dumps(name)).strip()]
    if pruned:
        lines += ["", _limits(found)]
    return "\n".join(lines) + "\n"


def _pruning(found: Inspection, making: Making) -> Table:
    layers = [*found.selected(), *pruned_besides(found, making)]
    rows = [("N:M pattern", _patterns(layers))]
    if making.masks is not None:
        rows.insert(0, ("score", making.score or "unknown"))
        for settings in making.settings:
            rows += [(_LABELS[key], str(settings[key])) for key in _LABELS if settings.get(key) is not None]
        rows.append(("masks", f"{making.masks}; every weight they remove is zero in these files"))
    sparsities = [t.sparsity for t in layers]
    rows.append(("sparsest and densest layer", f"{max(sparsities):.2%}, {min(sparsities):.2%}"))
    return Table("Pruning", ("", ""), rows + _versions(), [f"`{SPARSITY_FILE}` has the figures of every layer."])


def _patterns(layers: Sequence[TensorReport]) -> str:
    """The pattern of every layer, or how many layers have which."""
    counts = Counter(layer.pattern for layer in layers if layer.pattern)
    if not counts:
        return "none (unstructured)"
    whole = next((pattern for pattern in counts if all(layer.conforms(pattern) for layer in layers)), None)
    return whole or ", ".join(f"{pattern} in {count} of {len(layers)} layers" for pattern, count in counts.items())


def _shrinking(making: Making) -> Table:
    assert making.sizes is not None
    rows = [(name, f"{before:,} to {now:,}") for name, (before, now) in making.sizes.items() if before != now]
    for settings in making.settings if making.masks is None else ():  # else they are those of the pruning
        rows += [(key.replace("_", " "), str(value)) for key, value in settings.items() if value is not None]
    return Table("Shrinking", ("", ""), rows + _versions())


def _versions() -> list[tuple[str, str]]:
    packages = ("lightning-prune", "torch", "transformers")
    found = versions(packages)
    return [(package, found.get(package, "not installed")) for package in packages]


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
