"""The command ``lightning-prune``: Lightning's fit, validate, test and predict, and commands of its own."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import docstring_parser

TRAINER_COMMANDS = {
    "fit": "Train a model, with callbacks such as WeightPruning; takes --config FILE.yaml.",
    "validate": "Run one evaluation over the validation set.",
    "test": "Run one evaluation over the test set.",
    "predict": "Run inference on the data.",
}
"""Commands that Lightning's own command line answers."""

_BEFORE_COMMANDS = ("-c", "--config", "--print_config")

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

_NO_SETTINGS = "Unexpected config:"  # jsonargparse's, before all that is in the file

_OTHER_WEIGHTS = "Error(s) in loading state_dict for "  # torch's, of a checkpoint of another model

_TRIED = re.compile(
    r"Given value( type)?:|Errors:$|Subtypes: |Subclass types expect one of:|a class path \(str\)|a dict with"
    r"|Does not validate against any of the Union subtypes|Not a valid subclass of|Expected a path but |.*'NoneType'"
)
"""Lines of jsonargparse about types, which say nothing to people who wrote a value."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; default those of the process.

    Returns:
        Exit status: 0, 2 after an error of the user or where memory or disk end (one line on stderr), 130 after
        Ctrl-C, 143 after SIGTERM. Errors that are nobody's input keep their traceback.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # work of hours must not end at a letter of its report
    try:
        with _terminable():
            if _is_for_trainer(arguments):
                return _run_trainer(arguments, None if args is None else arguments)
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
        own = isinstance(error, _KNOWN) or _is_raised_here(error)
        hint = "" if own else f" ({TRACEBACK_VARIABLE}=1 shows where)"
        print(f"lightning-prune: error: {_one_line(error)}{hint}", file=sys.stderr)
        return _USER_ERROR


def _is_for_trainer(arguments: Sequence[str]) -> bool:
    """Whether to hand over to Lightning: a file with its section may stand first (``--config a.yaml fit``)."""
    if not arguments or arguments[0] in COMMANDS:
        return False
    before = arguments[0].partition("=")[0] in _BEFORE_COMMANDS
    return arguments[0] in TRAINER_COMMANDS or (before and any(argument in TRAINER_COMMANDS for argument in arguments))


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
    if str(error).startswith(_OTHER_WEIGHTS) or "can't allocate memory" in str(error):  # torch's on a CPU
        return True
    return any(kind.__name__ in ("OutOfMemoryError", "MisconfigurationException") for kind in type(error).__mro__)


def _is_raised_here(error: Exception) -> bool:
    """Whether the package itself has raised an error, whose message then says all."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(place).is_relative_to(Path(__file__).parent)


def _one_line(error: Exception) -> str:
    """The message without what jsonargparse adds: types that were tried in vain, and the whole configuration."""
    if str(error).startswith(_OTHER_WEIGHTS):
        # One line for each weight, or all of their names in one.
        names = re.findall(r'(?:"|for )([\w.]+)(?:"|: copying)', str(error))
        first = ", ".join(map(repr, names[:3]))
        return (
            f"the checkpoint is of another model: {len(names)} weights are in one of them only, or of other shapes, "
            f"such as {first}; give the model it was made with, or another checkpoint"
        )
    if outside := re.search(r"Option '(\S+)' is not accepted before subcommand '(\w+)'", str(error)):
        setting, command = outside.groups()
        return (
            f"the file before the command {command!r} has {setting!r} outside of a section {command!r}: give it after "
            f"the command (lightning-prune {command} --config FILE), or put its settings under {command}:"
        )
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not UTF-8 text ({error}); is --config the name of a YAML file?"
    if str(error).startswith(_NO_SETTINGS):
        begins = str(error).removeprefix(_NO_SETTINGS).strip()[:60]
        return f"a --config file must hold settings by name (such as trainer:), and one begins with {begins!r}"
    lines: list[str] = []
    for line in str(error).splitlines():
        line = line.strip().removeprefix("- ").strip()
        line = re.sub(r"Expected a dot import path string: (\S+)", r"no class \1 is known; give its import path", line)
        # Every type that was tried has its own line, and says the same of a value that none of them takes.
        if line and line not in lines and not _TRIED.match(line):
            lines.append(line)
    if isinstance(error, ArgumentError) and lines and lines[0].startswith("unrecognized arguments"):
        lines.append("(options stand after their command, whose --help lists them)")
    return " ".join(" ".join(lines).split()) or " ".join(str(error).split()) or type(error).__name__


# -- own commands ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would leave the process."""

    def error(self, message: str) -> NoReturn:
        raise _UserError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class _Command:
    """A command whose options are the arguments of a function.

    Attributes:
        line: What it does, for the list of commands.
        function: Where the function is, as ``module:name``; imported when the command is called.
        run: Calls it with the options, shows what it returns, and gives the exit status.
        more: Options that the function does not have, as arguments of ``add_argument`` by name.
        short: Short names of options.
    """

    line: str
    function: str
    run: Callable[[Callable[..., Any], dict[str, Any]], int]
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    short: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"lightning_prune.{module}"), name)  # type: ignore[no-any-return]


def parser_of(name: str) -> argparse.ArgumentParser:
    """Build the parser of one of the package's own commands from the signature and docstring of its function.

    What has no default is positional, what is False by default a flag, a sequence takes several values, and a mapping
    is written as JSON. What a command line cannot say (``progress``, objects) is left out.
    """
    command = COMMANDS[name]
    function = command.load()
    texts = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = _helps_of(function)
    parser = _Parser(prog=f"lightning-prune {name}", description=texts.short_description, allow_abbrev=False)
    for parameter in inspect.signature(function).parameters.values():
        kinds = set(re.findall(r"\w+", str(parameter.annotation)))
        kind = next(
            (k for k in (str, float, int, bool) if k.__name__ in kinds or (k is str and "Literal" in kinds)), None
        )
        if kind is None or parameter.name == "progress":
            continue
        short = [command.short[parameter.name]] if parameter.name in command.short else []
        text = helps[parameter.name].replace("%", "%%")
        default = parameter.default
        # By identity: 1 and 0 are equal to True and False.
        if "default" not in text.lower() and not any(default is none for none in (parameter.empty, None, False, ())):
            shown = "on" if default is True else " ".join(default) if isinstance(default, tuple) else default
            text += f" Default {shown}."
        options: dict[str, Any] = {"help": text}
        if parameter.default is parameter.empty:
            parser.add_argument(parameter.name, type=kind, **options)
            continue
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if parameter.default else "store_true"
            options["default"] = parameter.default
        else:
            options |= {"type": _number_or_mapping if "dict" in kinds else kind, "default": parameter.default}
            if kinds & {"Sequence", "list"}:
                options |= {"nargs": "+", "metavar": "VALUE"}
        parser.add_argument(*short, f"--{parameter.name}", **options)
    for option, settings in command.more.items():
        parser.add_argument(f"--{option}", **settings)
    return parser


def _number_or_mapping(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float, dict)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, or JSON such as '{{\"bytes\": 200000000}}'")
    return value


def _helps_of(function: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says of each argument; where it points to another function of the module, what that one says."""
    texts = docstring_parser.parse(inspect.getdoc(function) or "")
    found = {p.arg_name: " ".join((p.description or "").replace("``", "").split()) for p in texts.params}
    for name, text in found.items():
        if other := re.fullmatch(r"See `(\w+)`\.", text):
            found[name] = _helps_of(getattr(sys.modules[function.__module__], other[1]))[name]
    return found


def _run_own(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        command = COMMANDS[arguments[0]]
        options = vars(parser_of(arguments[0]).parse_args(arguments[1:]))
        return command.run(command.load(), options)
    parser = _Parser(
        prog="lightning-prune",
        description="Prune language models, and any PyTorch Lightning module, and keep them sparse.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    # Here for the list in --help alone: Lightning's parsers take seconds to build.
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, line in {**{name: command.line for name, command in COMMANDS.items()}, **TRAINER_COMMANDS}.items():
        commands.add_parser(name, help=line)
    if not arguments:
        parser.print_help(sys.stderr)
        return _USER_ERROR
    if not arguments[0].startswith("-") or arguments[0] in ("-h", "--help", "--version"):
        parser.parse_args(arguments)
    raise _UserError(f"{arguments[0]!r} must follow the command; see lightning-prune --help")


def _version() -> str:
    try:
        return version("lightning-prune")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _inspect(inspect: Callable[..., Any], options: dict[str, Any]) -> int:
    from lightning_prune.checkpoints.inspection import render

    found = inspect(options["path"])
    if options["json"]:
        print(json.dumps(found.to_dict(options["all"]), indent=2))
    else:
        render(found, all_tensors=options["all"])
    # For scripts: a checkpoint whose masked weights came back is not sound.
    return 1 if found.resurrected else 0


def _report(report: Callable[..., Any], options: dict[str, Any]) -> int:
    print(report(**options))
    return 0


def _export(export: Callable[..., Any], options: dict[str, Any]) -> int:
    from lightning_prune.checkpoints.inspection import render
    from lightning_prune.checkpoints.mask_files import export_masks

    if not options.pop("masks_only"):
        render(export(**options))
        return 0
    unused = [name for name in ("tokenizer", "dtype", "results") if options.pop(name) is not None]
    if unused:
        raise _UserError(f"--{unused[0]} says how to write a model; leave it out with --masks_only")
    print(f"{export_masks(**options)} masks written to {options['output']}")
    return 0


def _measure(function: Callable[..., Any], options: dict[str, Any]) -> int:
    """Measure, print, write."""
    from rich.console import Console

    from lightning_prune.results import check_outputs, write_results

    outputs = check_outputs(options.pop("output"))
    results = function(**options)
    console, tables = Console(), results.tables()
    # First of all: the reader of a pipe may go away.
    write_results(outputs, results.to_dict(), f"{function.__name__.capitalize()} {options['model']}", tables)
    for table in tables:
        console.print(table.rich())
        for note in table.notes:
            console.print(note, highlight=False, markup=False)
    for path in outputs:
        console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _call(function: Callable[..., Any], options: dict[str, Any]) -> int:
    function(**options)
    return 0


_OUTPUT = {
    "output": {"nargs": "+", "default": [], "metavar": "FILE", "help": "files to write: results.json, results.md"}
}

COMMANDS: Mapping[str, _Command] = {
    "prune": _Command(
        "Prune a model into a folder, without training; perplexity before and after.",
        "text.compress:compress",
        _call,
    ),
    "shrink": _Command(
        "Remove heads, channels or layers of a model at once, into a smaller one.",
        "text.compress:shrink",
        _call,
    ),
    "inspect": _Command(
        "Count the zeros of a checkpoint: sparsity, N:M structure, agreement with masks.",
        "checkpoints.inspection:inspect",
        _inspect,
        {
            "json": {"action": "store_true", "help": "print JSON in place of tables"},
            "all": {"action": "store_true", "help": "list every tensor, also those that are never pruned"},
        },
    ),
    "report": _Command(
        "Write one HTML file about a pruned model or a run.",
        "report:report",
        _report,
        short={"output": "-o"},
    ),
    "export": _Command(
        "Turn a checkpoint into one ordinary transformers folder.",
        "checkpoints.export:export",
        _export,
        {"masks_only": {"action": "store_true", "help": "write the masks alone, one bit a weight, to OUTPUT"}},
    ),
    "evaluate": _Command(
        "Measure perplexity and zero-shot tasks, with the dense model beside it.",
        "evaluation.evaluate:evaluate",
        _measure,
        _OUTPUT,
    ),
    "benchmark": _Command(
        "Measure latency, memory and size of a pruned model beside the dense one.",
        "evaluation.latency:benchmark",
        _measure,
        _OUTPUT,
    ),
    "quickstart": _Command(
        "Train a small language model, prune it in several ways, retrain it; no downloads.",
        "quickstart:quickstart",
        _call,
    ),
}
"""Commands of this package by name."""


# -- Lightning's commands --------------------------------------------------------------------------------------------


def _run_trainer(arguments: list[str], args: list[str] | None) -> int:
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
    from lightning_prune.callbacks.fit_end import check_saving, finish_fit
    from lightning_prune.checkpoints.reading import read_resumable
    from lightning_prune.errors import CheckpointError
    from lightning_prune.progress import is_main_process
    from lightning_prune.safety import expanded
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

            parser.add_argument(
                "--save_pretrained",
                type=str | None,
                default=None,
                help="folder to save the model to at the end of a fit, as transformers loads it; of fit alone",
            )

        def before_fit(self) -> None:
            """Refuse a folder that nothing can be saved to."""
            check_saving(self.model, self.config["fit"]["save_pretrained"])

        def after_fit(self) -> None:
            """Measure what was trained if nothing has yet, save it where it was asked for, and say where it is."""
            finish_fit(self.trainer, self.model, self.datamodule, self.config["fit"]["save_pretrained"])

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            """Parse, and keep the checkpoint from Lightning 2.6, which would read it without our checks."""
            super().parse_arguments(parser, args)
            self.checkpoint = self._command().get("ckpt_path")
            if self.checkpoint:
                self._command().ckpt_path = None

        def _command(self) -> Any:
            return self.config[self.config["subcommand"]]

        def before_instantiate_classes(self) -> None:
            """Take the architecture from a checkpoint, also from one that no command line wrote.

            Raises:
                _UserError: another command than fit is asked to save the model.
            """
            folder, command = self._command().get("save_pretrained"), self.config["subcommand"]
            if folder is not None and command != "fit":
                said = f"save_pretrained={folder!r} is of fit: {command} changes no weights, and saves none"
                if any(argument.partition("=")[0] == "--save_pretrained" for argument in arguments):
                    raise _UserError(f"{said}; leave it out, or write a checkpoint's model with lightning-prune export")
                if is_main_process():  # a file that was made for fit serves here too
                    print(said, file=sys.stderr)
            if self.checkpoint:
                self._take_architecture(self.checkpoint)
                self._command().ckpt_path = self.checkpoint

        def _take_architecture(self, path: str) -> None:
            if path in ("best", "last", "hpc") or path.startswith("registry"):
                return  # the Trainer finds it; callbacks read it before it is loaded
            command = self._command()
            checkpoint = read_resumable(path)
            if expanded(path, "ckpt_path").is_dir():
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
        args=args,
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


if __name__ == "__main__":  # python -m lightning_prune.cli, where the command is not on the path
    sys.exit(main())
