"""The commands ``evaluate`` and ``benchmark``: their options, and what they print and write."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning_prune.tables import Table

_MODEL = "transformers folder, Lightning .ckpt, distributed checkpoint, .gguf file, or hub id"


def evaluate_parser() -> ArgumentParser:
    """Options of ``lightning-prune evaluate``."""
    parser = ArgumentParser(description="Measure perplexity and zero-shot tasks, with the dense model beside it.")
    parser.add_argument("model", type=str, help=_MODEL)
    parser.add_argument("--text", type=str, nargs="+", default=[], help="text files for perplexity")
    parser.add_argument(
        "--tasks",
        type=str,
        nargs="+",
        default=[],
        help="tasks of lm-eval by name, .jsonl files or folders of them; blimp:PATH for minimal pairs",
    )
    parser.add_argument("--baseline", type=str, help="the dense model, measured beside it")
    parser.add_argument("--output", type=str, nargs="+", default=[], help="files to write: results.json, results.md")
    parser.add_argument("--seq_len", type=int, help="tokens in a window of text; default 512, less if they take less")
    parser.add_argument("--stride", type=int, help="tokens between windows; default seq_len, no overlap")
    parser.add_argument("--max_windows", type=int, help="at most so many windows a text, spread evenly; default all")
    parser.add_argument("--limit", type=int, help="at most so many samples a task; default all")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in one forward pass")
    _add_common(parser)
    parser.add_argument("--tokenizer", type=str, help="hub id, folder, .gguf or tokenizer.json; default the model's")
    return parser


def benchmark_parser() -> ArgumentParser:
    """Options of ``lightning-prune benchmark``."""
    parser = ArgumentParser(description="Measure latency, memory and size of a pruned model beside the dense one.")
    parser.add_argument("model", type=str, help=_MODEL)
    parser.add_argument("--dense", type=str, help="the dense model, measured in turns with it")
    parser.add_argument("--output", type=str, nargs="+", default=[], help="files to write: results.json, results.md")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences")
    parser.add_argument(
        "--prompt_tokens", type=int, help="tokens of each prompt; default 128, less if the model takes less"
    )
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens to decode after it")
    parser.add_argument("--repeats", type=int, default=10, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them")
    _add_common(parser)
    return parser


def _add_common(parser: ArgumentParser) -> None:
    parser.add_argument("--dtype", type=str, help="float32, bfloat16 or float16; default as stored")
    parser.add_argument("--device", type=str, help="such as cuda or cpu; default CUDA where there is one")


def run_evaluate(config: Namespace) -> int:
    """Measure, print, write."""
    from lightning_prune.evaluate import evaluate
    from lightning_prune.tables import check_outputs

    options = config.as_dict()
    outputs = check_outputs(options.pop("output"))
    results = evaluate(**options)
    _show(results.to_dict(), results.tables(), outputs, f"Evaluation of {config.model}")
    return 0


def run_benchmark(config: Namespace) -> int:
    """Measure, print, write."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks
    from lightning_prune.latency import benchmark
    from lightning_prune.tables import check_outputs

    options = config.as_dict()
    outputs = check_outputs(options.pop("output"))
    results = benchmark(**options)
    _show(results.to_dict(), results.tables(), outputs, f"Speed of {config.model}")
    return 0


def _show(results: dict[str, Any], tables: Sequence[Table], outputs: Sequence[Path], title: str) -> None:
    from rich.console import Console

    from lightning_prune.tables import write_results

    console = Console()
    for table in tables:
        console.print(table.rich())
        for note in table.notes:
            console.print(note, highlight=False, markup=False)
    write_results(outputs, results, title, tables)
    for path in outputs:
        console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)
