"""The command ``lightning-prune``: Lightning's fit, validate, test and predict, and commands of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning_prune.results import Table


TRAINER_COMMANDS = {
    "fit": "Train a model, with callbacks such as WeightPruning; takes --config FILE.yaml.",
    "validate": "Run one evaluation over the validation set.",
    "test": "Run one evaluation over the test set.",
    "predict": "Run inference on the data.",
}
"""Commands that Lightning's own command line answers."""

OWN_COMMANDS = ("inspect", "report", "export", "evaluate", "benchmark", "quickstart")
"""Commands of this package."""

TRACEBACK_VARIABLE = "LIGHTNING_PRUNE_TRACEBACK"
"""Environment variable: 1 shows where an error came from, in place of the one line."""

_USER_ERROR = 2
_INTERRUPTED = 130
_TERMINATED = 143


class _Terminated(SystemExit):
    """SIGTERM has come."""


class _UserError(Exception):
    """The command line is wrong; the message says how."""


_KNOWN = (_UserError, ArgumentError)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; default those of the process.

    Returns:
        Exit status: 0, 2 after an error of the user or where memory or disk end (one line on stderr), 130 after
        Ctrl-C, 143 after SIGTERM. Errors that are nobody's input keep their traceback.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        with _terminable():
            if _is_for_trainer(arguments):
                return _run_trainer(None if args is None else arguments)
            return _run_own(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone (`... | head`). Python would complain once more on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leaving:
        # Lightning answers Ctrl-C by tearing down and leaving with 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            return _INTERRUPTED
        # Lightning's own ends a fit at the next batch, and names no status.
        if isinstance(leaving, _Terminated) or type(leaving).__name__ == "SIGTERMException":
            print("terminated", file=sys.stderr)
            return _TERMINATED
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except Exception as error:
        if not _is_of_the_user(error) or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        own = isinstance(error, _KNOWN) or type(error).__module__.startswith("lightning_prune.")
        hint = "" if own else f" ({TRACEBACK_VARIABLE}=1 shows where)"
        print(f"lightning-prune: error: {_one_line(error)}{hint}", file=sys.stderr)
        return _USER_ERROR


def _is_for_trainer(arguments: Sequence[str]) -> bool:
    """Whether to hand over to Lightning: its commands may follow options (``--config a.yaml fit``)."""
    if not arguments or arguments[0] in OWN_COMMANDS:
        return False
    return arguments[0] in TRAINER_COMMANDS or (
        arguments[0].startswith("-") and any(argument in TRAINER_COMMANDS for argument in arguments)
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that half-written files go away."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        # While it trains, Lightning has a handler of its own that calls this one too. It ends the fit at the next
        # batch, and under SLURM not at all.
        if signal.getsignal(signal.SIGTERM) is terminate:
            raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_of_the_user(error: Exception) -> bool:
    # ValueError and TypeError are what every check of an argument raises, here and in Lightning.
    if isinstance(error, (*_KNOWN, ValueError, TypeError, OSError, MemoryError)):
        return True
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's, GPU and CPU
        return True
    return any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__)


def _one_line(error: Exception) -> str:
    """The message without what jsonargparse adds: types that were tried in vain, and the whole configuration."""
    lines = []
    for line in str(error).splitlines():
        if line.strip().startswith(("Given value type:", "Given value:")):
            continue
        if "<class 'NoneType'>" in line or line.strip() == "Errors:":
            continue
        line = line.replace("Does not validate against any of the Union subtypes", "")
        lines.append(line.strip().removeprefix("- "))
    return " ".join(" ".join(lines).split()) or type(error).__name__


# -- own commands ----------------------------------------------------------------------------------------------------


def _run_own(arguments: list[str]) -> int:
    parser = _own_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return _USER_ERROR
    config = parser.parse_args(arguments)
    if config.subcommand == "inspect":
        return _inspect(config.inspect)
    if config.subcommand == "report":
        return _report(config.report)
    if config.subcommand == "export":
        return _export(config.export)
    if config.subcommand == "evaluate":
        return run_evaluate(config.evaluate)
    if config.subcommand == "benchmark":
        return run_benchmark(config.benchmark)
    if config.subcommand == "quickstart":
        return _quickstart(config.quickstart)
    raise _UserError(f"nothing to do for {config.subcommand!r}; see lightning-prune --help")


def _own_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-prune",
        description="Prune language models, and any PyTorch Lightning module, and keep them sparse.",
        version=_version(),
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=False)

    inspect = ArgumentParser(
        description="Count the zeros of a checkpoint: sparsity, N:M structure, agreement with masks."
    )
    inspect.add_argument(
        "path",
        type=str,
        help="transformers folder, .safetensors, Lightning .ckpt, state dict, or folder of a distributed checkpoint",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON in place of tables")
    inspect.add_argument("--all", action="store_true", help="list every tensor, also those that are never pruned")
    commands.add_subcommand("inspect", inspect, help="Count the zeros of a checkpoint.")

    report = ArgumentParser(description="Write one HTML file about a pruned model or a run.")
    report.add_argument("path", type=str, help="folder of a Lightning run, or a model: whatever inspect reads")
    report.add_argument("-o", "--output", type=str, default="report.html", help="file to write")
    report.add_argument("--dense", type=str, help="the model before it was pruned: shows what was pruned")
    report.add_argument(
        "--results", type=str, nargs="+", default=[], help="JSON files of quickstart, evaluate or tests/benchmarks"
    )
    report.add_argument(
        "--layers", type=str, nargs="+", default=[], help="name patterns of the matrices to draw, such as layers.0"
    )
    commands.add_subcommand("report", report, help="Write one HTML file about a pruned model or a run.")

    export = ArgumentParser(description="Turn a checkpoint into one ordinary transformers folder.")
    export.add_argument(
        "checkpoint", type=str, help="Lightning .ckpt, folder of a distributed checkpoint, or transformers folder"
    )
    export.add_argument("output", type=str, help="folder to write; a .safetensors file with --masks_only")
    export.add_argument(
        "--tokenizer",
        type=str,
        help="hub id, folder, .gguf, tokenizer.json, or none; default the one the checkpoint names",
    )
    export.add_argument("--dtype", type=str, help="float32, bfloat16 or float16; default as stored")
    export.add_argument("--overwrite", action="store_true", help="replace the model that is in the folder")
    export.add_argument("--results", type=str, help="results.json of lightning-prune evaluate, for the model card")
    export.add_argument("--masks_only", action="store_true", help="write the masks alone, one bit a weight")
    commands.add_subcommand("export", export, help="Turn a checkpoint into one ordinary transformers folder.")

    commands.add_subcommand("evaluate", evaluate_parser(), help="Measure perplexity and zero-shot tasks.")
    commands.add_subcommand("benchmark", benchmark_parser(), help="Measure latency, memory and size, dense and pruned.")

    quickstart = ArgumentParser(
        description="Train a small language model, prune it in several ways, retrain it; no downloads."
    )
    quickstart.add_argument("--output", type=str, default="quickstart", help="folder for models, results, picture")
    quickstart.add_argument("--seed", type=int, default=0, help="of weights, data order and everything else")
    quickstart.add_argument("--steps", type=int, default=600, help="training steps of the dense model")
    quickstart.add_argument("--retrain_steps", type=int, default=120, help="training steps after pruning")
    commands.add_subcommand("quickstart", quickstart, help="Train, prune and retrain a small model; no downloads.")

    # Here for the list in --help alone: Lightning's parsers take seconds to build.
    for name, line in TRAINER_COMMANDS.items():
        commands.add_subcommand(name, ArgumentParser(description=line), help=line)
    return parser


def _version() -> str:
    try:
        return version("lightning-prune")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _inspect(config: Namespace) -> int:
    import json

    from lightning_prune.checkpoints.inspection import inspect, render

    inspection = inspect(config.path)
    if config.json:
        print(json.dumps(inspection.to_dict(config.all), indent=2))
    else:
        render(inspection, all_tensors=config.all)
    # For scripts: a checkpoint whose masked weights came back is not sound.
    return 1 if inspection.resurrected else 0


def _report(config: Namespace) -> int:
    from lightning_prune.report import report

    print(report(**config.as_dict()))
    return 0


def _export(config: Namespace) -> int:
    options = config.as_dict()
    if options.pop("masks_only"):
        return _export_masks(options)
    from lightning_prune.checkpoints.export import export
    from lightning_prune.checkpoints.inspection import render

    render(export(**options))
    return 0


def _export_masks(options: dict[str, Any]) -> int:
    from lightning_prune.checkpoints.mask_files import export_masks

    unused = [name for name in ("tokenizer", "dtype", "results") if options.pop(name) is not None]
    if unused:
        raise _UserError(f"--{unused[0]} says how to write a model; leave it out with --masks_only")
    print(f"{export_masks(**options)} masks written to {options['output']}")
    return 0


def _quickstart(config: Namespace) -> int:
    from lightning_prune.quickstart import quickstart

    quickstart(**config.as_dict())
    return 0


# -- Lightning's commands --------------------------------------------------------------------------------------------


def _run_trainer(arguments: list[str] | None) -> int:
    from pathlib import Path

    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    # Named here, so that YAML files may write `class_path: WeightPruning`.
    from lightning_prune import (
        CausalLM,
        PERPRetraining,
        PruningAwarePretraining,
        SparsityMonitor,
        TextDataModule,
        WeightPruning,
    )
    from lightning_prune.callbacks.checks import CheckpointCheck
    from lightning_prune.callbacks.fit_end import finish_fit
    from lightning_prune.checkpoints.reading import read_resumable
    from lightning_prune.errors import CheckpointError
    from lightning_prune.schedules import CubicSchedule, LinearSchedule, OneShot

    callbacks = (WeightPruning, PERPRetraining, PruningAwarePretraining, SparsityMonitor)
    known = (CausalLM, TextDataModule, *callbacks, CubicSchedule, LinearSchedule, OneShot)
    short_names = {kind.__name__: f"lightning_prune.{kind.__name__}" for kind in known}

    class PruneCLI(LightningCLI):
        """Lightning's command line with a language model and text as what is trained unless something else is."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.set_defaults(
                {
                    "model": {"class_path": short_names["CausalLM"]},
                    "data": {"class_path": short_names["TextDataModule"]},
                }
            )

        def after_fit(self) -> None:
            """Measure what was trained if nothing has yet, and say where it is."""
            finish_fit(self.trainer, self.model, self.datamodule)

        def _parse_ckpt_path(self) -> None:
            """Take the architecture from a checkpoint, also from one that no command line wrote."""
            command = self.config[self.config["subcommand"]]
            path = command.get("ckpt_path")
            if not path or path in ("best", "last", "hpc") or path.startswith("registry"):
                return  # the Trainer finds it; callbacks read it before it is loaded
            checkpoint = read_resumable(path)
            if Path(path).is_dir():
                return
            hyper_parameters = dict(checkpoint.get("hyper_parameters") or {})
            hyper_parameters.pop("_instantiator", None)
            named = {*short_names.values(), f"{CausalLM.__module__}.CausalLM", *_class_paths(command.as_dict())}
            for found in _class_paths(hyper_parameters):
                if found not in named:
                    raise CheckpointError(
                        f"{path} names the class {found!r}, which is not imported on the word of a file; name it "
                        "yourself if you trust it (--model for a model, else in the YAML file)"
                    )
            class_path = hyper_parameters.pop("_class_path", command.model.class_path)
            if hyper_parameters:
                model = {"class_path": class_path, "dict_kwargs": hyper_parameters}
                self.config = self.parser.parse_object({self.config["subcommand"]: {"model": model}}, self.config)

    PruneCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        # A second run into the same folder is what people do; the configuration is that of the last.
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [CheckpointCheck()]},
        parser_kwargs={"prog": "lightning-prune", "version": _version(), "exit_on_error": False},
        args=arguments,
    )
    return 0


def _class_paths(value: Any) -> Iterator[str]:
    """Whatever nested settings name as a class."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("class_path", "_class_path") and isinstance(item, str):
                yield item
            yield from _class_paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _class_paths(item)


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
    from lightning_prune.evaluation.evaluate import evaluate
    from lightning_prune.results import check_outputs

    options = config.as_dict()
    outputs = check_outputs(options.pop("output"))
    results = evaluate(**options)
    _show(results.to_dict(), results.tables(), outputs, f"Evaluation of {config.model}")
    return 0


def run_benchmark(config: Namespace) -> int:
    """Measure, print, write."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks
    from lightning_prune.evaluation.latency import benchmark
    from lightning_prune.results import check_outputs

    options = config.as_dict()
    outputs = check_outputs(options.pop("output"))
    results = benchmark(**options)
    _show(results.to_dict(), results.tables(), outputs, f"Speed of {config.model}")
    return 0


def _show(results: dict[str, Any], tables: Sequence[Table], outputs: Sequence[Path], title: str) -> None:
    from rich.console import Console

    from lightning_prune.results import write_results

    console = Console()
    for table in tables:
        console.print(table.rich())
        for note in table.notes:
            console.print(note, highlight=False, markup=False)
    write_results(outputs, results, title, tables)
    for path in outputs:
        console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)
