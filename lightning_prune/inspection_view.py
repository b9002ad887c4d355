"""An inspection as tables in a terminal."""

from __future__ import annotations

from collections import Counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_prune.inspection import Inspection, totals_of
from lightning_prune.tensor_names import order_kinds


def render(inspection: Inspection, console: Console | None = None, all_tensors: bool = False) -> None:
    """Print an inspection as tables.

    Args:
        inspection: What `inspect` returned.
        console: Where to print; default standard output.
        all_tensors: One row a tensor, also those that are not pruned, instead of one row a block.
    """
    console = console or Console()
    everything, prunable = inspection.totals(True), inspection.totals()
    console.print(f"[bold]{_escape(inspection.path)}[/bold]", highlight=False, soft_wrap=True)
    console.print(
        f"{inspection.format}, {format_bytes(inspection.bytes_on_disk)} on disk, {everything.tensors} tensors, "
        f"{everything.numel:,} parameters",
        highlight=False,
    )
    console.print(_tensor_table(inspection) if all_tensors else _block_table(inspection))
    console.print(
        f"[bold]{prunable.sparsity:.2%}[/bold] of {prunable.numel:,} prunable weights in {prunable.tensors} "
        f"tensors are zero ({everything.sparsity:.2%} of all parameters); {pattern_line(inspection)}",
        highlight=False,
    )
    if inspection.masks is not None:
        console.print(_mask_line(inspection), highlight=False)


def pattern_line(inspection: Inspection) -> str:
    """Which N:M patterns the prunable tensors follow, in words."""
    if inspection.pattern:
        return f"every one of them is {inspection.pattern}"
    found = Counter(t.pattern for t in inspection.selected() if t.pattern)
    if not found:
        return "no N:M pattern"
    return ", ".join(f"{count} of {len(inspection.selected())} are {pattern}" for pattern, count in found.items())


def _mask_line(inspection: Inspection) -> str:
    compared = [t.mask for t in inspection.tensors if t.mask]
    masked = sum(m.masked for m in compared)
    if inspection.resurrected:
        wrong = [t.name for t in inspection.tensors if t.mask and t.mask.resurrected]
        return (
            f"[bold red]Masks broken:[/bold red] {inspection.resurrected:,} of {masked:,} masked weights are not "
            f"zero, in {len(wrong)} tensors such as {_escape(wrong[0])}"
        )
    missing = (inspection.masks or 0) - len(compared)
    note = f"; {missing} masks belong to no tensor here" if missing else ""
    kept = f"all {masked:,} weights masked by {len(compared)} stored masks are zero"
    return f"[green]Masks kept:[/green] {kept}{note}"


def _block_table(inspection: Inspection) -> Table:
    """Blocks by kinds of layer, where there are not too many kinds; otherwise sums by block."""
    chosen = inspection.selected()
    kinds = order_kinds(t.kind for t in chosen if t.block)
    # One stack of blocks is named in the title, and its rows by number, which leaves room for the columns.
    stacks = {t.block.rpartition(".")[0] for t in chosen if t.block}
    stack = f"{stacks.pop()}." if len(stacks) == 1 and stacks != {""} else ""
    title = f"Sparsity by block of {stack[:-1]}" if stack else "Sparsity by block"
    table = Table(title=_escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("block", no_wrap=True, justify="right" if stack else "left")
    wide = 1 < len(kinds) <= 8
    if wide:
        for kind in kinds:
            table.add_column(kind.removesuffix("_proj"), justify="right")
    else:
        table.add_column("weights", justify="right")
    table.add_column("total", justify="right", style="bold")
    for block, totals in inspection.blocks().items():
        cells = [f"{totals.numel:,}"]
        if wide:
            here = {k: totals_of([t for t in chosen if t.block == block and t.kind == k]) for k in kinds}
            cells = [f"{h.sparsity:.1%}" if h.tensors else "" for h in here.values()]
        table.add_row(_escape(block.removeprefix(stack)) or "other", *cells, f"{totals.sparsity:.2%}")
    return table


def _tensor_table(inspection: Inspection) -> Table:
    table = Table(title="Tensors", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("name", overflow="fold")
    for column in ("shape", "dtype", "zeros", "sparsity", "N:M", "prunable"):
        table.add_column(column, justify="right", no_wrap=column != "dtype")
    for t in inspection.tensors:
        name = f"{t.name} (= {t.tied_to})" if t.tied_to else t.name
        table.add_row(
            _escape(name),
            "x".join(map(str, t.shape)) or "scalar",
            t.dtype,
            f"{t.zeros:,}",
            f"{t.sparsity:.2%}",
            t.pattern or "",
            "yes" if t.prunable else "",
        )
    return table


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def format_bytes(size: float) -> str:
    """A size with its unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
