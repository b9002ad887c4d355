"""Put a report together: read, measure, fill the template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lightning_prune.checkpoints.inspection import pattern_line
from lightning_prune.checkpoints.states import states_of
from lightning_prune.history import versions
from lightning_prune.naming import order_kinds, place
from lightning_prune.pruning.score_histograms import ScoreSummary
from lightning_prune.pruning.targets import reject_bare_string
from lightning_prune.report import sections
from lightning_prune.report.figures import histograms
from lightning_prune.report.measure import Measured, Results, Source, measure, open_source, read_results
from lightning_prune.report.sections import summarize
from lightning_prune.safety import check_writable, expanded, replace_text

TEMPLATES = Path(__file__).with_name("templates")
"""Where the page's template and style are."""

_SIGNATURE = "Written by lightning-prune "


def report(
    path: str | Path,
    output: str | Path = "report.html",
    dense: str | Path | None = None,
    results: Sequence[str | Path] = (),
    layers: Sequence[str] = (),
    progress: bool = True,
) -> Path:
    """Write a report about a pruned model: one HTML file that loads nothing and runs no script.

    It shows how the model was made, as far as its files say; the sparsity of each layer; how zeros lie in rows and
    columns; histograms of scores and weights, kept and pruned; curves of the training; measurements; size.

    Args:
        path: Folder of a Lightning run, or a model: whatever `inspect` reads.
        output: File to write; an old report is replaced when the new one is whole.
        dense: The model before it was pruned, for histograms of what was pruned, and for sizes.
        results: JSON files of ``lightning-prune quickstart`` or ``evaluate``, or of ``tests/benchmarks``.
        layers: Name patterns of the matrices to draw, at most 12; default the one of each type whose rows and columns
            differ most.
        progress: Show a bar where stderr is a terminal.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: `path` or `dense` cannot be read, or `dense` is another model.
        ResultsError: a file of `results` holds no measurements.
        ValueError: a pattern in `layers` matches no pruned matrix, or `output` is a folder, cannot be written, or is
            a file of another kind.
    """
    reject_bare_string("results", results)
    reject_bare_string("layers", layers)
    output = expanded(output, "output")
    if output.is_dir():
        raise ValueError(
            f"output={str(output)!r} is a folder; name a file in it, such as {str(output / 'report.html')!r}"
        )
    check_writable(output)
    if output.is_file() and not _may_replace(output):
        raise ValueError(f"output={str(output)!r} is there, and is no report; give the name of a new file")
    read = [read_results(file) for file in results]
    source = open_source(path)
    page = render(source, measure(source.checkpoint, dense, progress), read, layers)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, page)
    return output


def _may_replace(file: Path) -> bool:
    """Whether a file is empty or ends as a report does: no model that the wrong name was given of."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 500))
        end = opened.read()
    return not end or _SIGNATURE.encode() in end


def render(source: Source, measured: Measured, results: Sequence[Results] = (), layers: Sequence[str] = ()) -> str:
    """The page as text; see `report`."""
    inspection = measured.inspection
    score_name, scores = _scores(source)
    masks, scale = sections.mask_pictures(measured, layers)
    totals = inspection.totals(True)
    values: dict[str, Any] = {
        "title": sections.title(source.path),
        "subtitle": f"{inspection.format}, {totals.numel:,} parameters in {totals.tensors} tensors",
        "tiles": sections.tiles(source, measured, results),
        "warning": sections.warning(inspection),
        "facts": summarize(source),
        "heat": sections.sparsity_heat(inspection),
        "patterns": pattern_line(inspection) if inspection.selected() else "",
        "curves": sections.curves(source),
        "masks": masks,
        "scale": scale,
        "score_name": score_name,
        "scores": histograms(scores, _in_order({name: place(name)[1] for name in scores.layers})),
        "magnitudes": histograms(measured.magnitudes, _in_order({t.name: t.kind for t in inspection.selected()})),
        "dense": measured.dense,
        "saliency": sections.score_heat(source, scores),
        "results": [sections.results_table(file, source.path) for file in results],
        "sizes": sections.sizes(measured),
        "speed": sections.speed(inspection, bool(sections.shrunk(source))),
        "tensors": inspection.tensors,
        "notes": source.notes,
        "signature": _SIGNATURE,
        "version": versions().get("lightning-prune", "(not installed)"),
    }
    names = {
        "summary": ("How it was made", True),
        "sparsity": ("Sparsity", True),
        "training": ("Training", values["curves"]),
        "masks": ("Masks", masks),
        "histograms": ("Histograms", values["scores"] or values["magnitudes"]),
        "saliency": ("Scores", values["saliency"]),
        "quality": ("Quality", results),
        "size": ("Size", True),
        "tensors": ("Tensors", True),
    }
    values["sections"] = [(key, name) for key, (name, there) in names.items() if there]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["share"] = sections.share
    return environment.get_template("report.html.jinja").render(values)


def _in_order(kinds: dict[str, str]) -> dict[str, str]:
    """Names with their kinds, kind after kind."""
    order = order_kinds(kinds.values())
    return dict(sorted(kinds.items(), key=lambda item: order.index(item[1])))


def _scores(source: Source) -> tuple[str, ScoreSummary]:
    """Names and histograms of the scores that `WeightPruning` callbacks left in the checkpoint."""
    names: dict[str, None] = {}
    together = ScoreSummary()
    for state in states_of(source.checkpoint.callbacks, "WeightPruning").values():
        if isinstance(state, dict):
            summary = ScoreSummary.from_state(state.get("scores"))
            if summary.layers:
                names[str(state.get("score"))] = None
                together.layers |= summary.layers
    return ", ".join(names), together
