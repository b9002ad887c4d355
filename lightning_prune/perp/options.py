"""What a user may ask for: PEFT's ``LoraConfig``, parts of a model, a reconstruction; refused what breaks the zeros."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_prune.errors import check_whole
from lightning_prune.naming import clean_name, clean_path, is_bias, is_head, own_parameters, uncompiled
from lightning_prune.perp.layers import CombinedLinear, find_variant
from lightning_prune.progress import warn
from lightning_prune.pruning.experts import expert_parameters
from lightning_prune.pruning.zeros import CONVOLUTIONS
from lightning_prune.sharding import type_name

# Section 4 and the published settings of arXiv 2312.15230: rank 16, alpha twice the rank.
DEFAULT_RANK = 16
OPTIONS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
_SCALINGS = ("lora_alpha", "use_rslora", "alpha_pattern")
_INSTEAD = {
    "bias": "train=('bias',)",
    "lora_bias": "train=('bias',)",
    "target_parameters": "target_modules, which names parameters of experts too",
    "modules_to_save": "train, any of 'norm', 'head' and 'embedding'",
}


def check_adapter(adapter: object) -> None:
    """Refuse an unknown variant.

    Raises:
        ValueError: none that is known, nor None.
    """
    if adapter is not None:
        find_variant(adapter)


def make_config(adapter: str, options: Mapping[str, Any]) -> LoraConfig:
    """The configuration, with the layer classes of the variant registered.

    Args:
        adapter: The variant.
        options: Fields of LoraConfig. Defaults: ``r=16``, ``lora_alpha=2 * r``.

    Raises:
        TypeError: an option that LoraConfig does not have.
        ValueError: one that does not go with the variant, or a value out of range.
    """
    check_options(adapter, options)
    options = dict(options)
    rank = options.setdefault("r", DEFAULT_RANK)
    options.setdefault("lora_alpha", 2 * rank)
    config = LoraConfig(**options)
    layer = find_variant(adapter)
    config._register_custom_module({nn.Linear: layer, Conv1D: layer})
    return config


def check_options(adapter: str | None, options: Mapping[str, Any]) -> None:
    """Refuse options that do not go with a variant; see `make_config`."""
    if adapter is None and options:
        raise ValueError(f"adapter=None takes no LoRA options, got {sorted(options)}; leave them out")
    for name, value in options.items():
        if name in OPTIONS:
            continue
        if name not in LoraConfig.__dataclass_fields__:
            near = difflib.get_close_matches(name, OPTIONS, n=1) or [", ".join(OPTIONS)]
            raise TypeError(f"{name}={value!r} is no option of LoRA; did you mean {near[0]}?")
        instead = f"use {_INSTEAD[name]}" if name in _INSTEAD else f"the options are {', '.join(OPTIONS)}"
        raise ValueError(f"{name}={value!r} is not supported for adapters of a pruned model; {instead}")
    if adapter is None:
        return
    layer = find_variant(adapter)
    rank, dropout = options.get("r", DEFAULT_RANK), options.get("lora_dropout", 0.0)
    check_whole("r", rank, hint=f", such as {DEFAULT_RANK}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout={dropout!r} must be a number in [0, 1)")
    if dropout and issubclass(layer, CombinedLinear):
        raise ValueError(
            f"lora_dropout={dropout!r} must be 0 for adapter={adapter!r}: it would drop inputs of the adapter alone, "
            "but adapter and weight are one matrix here; use weight decay, or adapter='lora_prune'"
        )
    init = options.get("init_lora_weights", True)
    if init not in layer.inits:
        raise ValueError(
            f"init_lora_weights={init!r} must be one of {layer.inits} for adapter={adapter!r}; PEFT's others "
            "change the base weights, which would fill their zeros, or need data"
        )
    alpha = options.get("lora_alpha")
    if alpha is not None and not is_scaling(alpha):
        raise ValueError(f"lora_alpha={alpha!r} must be a number above 0, up to 1e6; the default is 2 r")
    for name in _SCALINGS:
        if not layer.scaled and options.get(name):
            raise ValueError(
                f"{name}={options[name]!r} has no effect on adapter={adapter!r}, whose product is not scaled; leave it "
                "out"
            )


def is_scaling(value: object) -> bool:
    """Whether a number can be lora_alpha."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e6


class WholeNames(list[str]):
    """Names of modules that mean these alone, as ``target_modules``; without what ``torch.compile`` adds, or with it.

    In a list PEFT takes them for endings too: ``fc`` is ``block.fc`` as well. And for names that are whole it passes
    over ``layers_to_transform``.
    """


def match_modules(model: nn.Module, adapter: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the modules that ``target_modules`` and its companions name, as PEFT would find them.

    Names count with what ``torch.compile`` adds and without it. Experts that hold their weights as parameters are named
    by these (``experts.down_proj``), and all at once by their own name (``experts``). What takes no adapter is left out
    where it is named beside what does (``.*mlp.*``): activations, norms, and whatever holds others.

    Raises:
        ValueError: none, or a pattern that cannot be compiled.
    """
    chosen, everything = options["target_modules"], dict(nameable(model))
    among = set(map(clean_path, chosen)) if isinstance(chosen, WholeNames) else None
    if among is not None:
        chosen = sorted({name.rpartition(".")[2] for name in among})
    if not isinstance(chosen, str) and not (
        isinstance(chosen, (Sequence, set)) and chosen and all(isinstance(name, str) for name in chosen)
    ):
        raise ValueError(f"target_modules={chosen!r} must be a list of module names or a regular expression")
    check_options(adapter, options)
    excluded = _excluded(model, everything, options.get("exclude_modules"))
    names = {n: p for n, p in everything.items() if n not in excluded and (among is None or clean_path(n) in among)}
    narrowing = {name: options.get(name) for name in _NARROWING if name != "exclude_modules"}
    entries = [list(chosen)] if among is not None else _entries(chosen)
    try:
        matched = [_named(names, entry, **narrowing) for entry in entries]
    except re.error as error:
        raise ValueError(f"target_modules={chosen!r} is no regular expression: {error}") from error
    if not any(matched) and among is not None:
        given = {name: options[name] for name in _NARROWING if options.get(name) is not None}
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())} leaves none of the {len(among)} layers "
            f"that would get an adapter, such as {min(among)!r}: leave it out, or name others"
        )
    if not any(matched):
        tails = sorted({clean_path(name).rsplit(".", 1)[-1] for name in names})
        near = [
            n for c in ([chosen] if isinstance(chosen, str) else chosen) for n in difflib.get_close_matches(c, tails)
        ]
        raise ValueError(
            f"target_modules={chosen!r} matches no module of {type(model).__name__}; did you mean "
            f"{', '.join(map(repr, near or tails[:8]))}?"
        )
    if among is None:
        unmatched = [entry for entry, found in zip(entries, matched, strict=True) if not found]
        if nothing := [entry for entry in unmatched if not _named(everything, entry)]:  # others were narrowed away
            warn(f"target_modules: {', '.join(map(_said, nothing))} matches no layer that can get an adapter")
        matched = [_adaptable_of(model, names, entry, found) for entry, found in zip(entries, matched, strict=True)]
    return [name for name in names if any(name in found for found in matched)]


def _entries(chosen: str | Collection[str]) -> list[str | list[str]]:
    """The regular expression, or each name of a list by itself."""
    return [chosen] if isinstance(chosen, str) else [[name] for name in chosen]


def _said(entry: str | list[str]) -> str:
    return repr(entry if isinstance(entry, str) else entry[0])


def _excluded(model: nn.Module, names: Mapping[str, str], chosen: Any) -> set[str]:
    """What ``exclude_modules`` names; told where that is nothing which could get an adapter."""
    found: set[str] = set()
    for entry in _entries(chosen) if chosen else ():
        try:
            matched = _named(names, entry)
        except re.error as error:
            raise ValueError(f"exclude_modules={chosen!r} is no regular expression: {error}") from error
        if not any(name != names[name] or _takes_adapter(model.get_submodule(name)) for name in matched):
            warn(
                f"exclude_modules: {_said(entry)} matches no layer that can get an adapter; a regular expression, such "
                f"as '.*{entry[0]}.*', also excludes what is inside"
                if isinstance(entry, list)
                else "",
            )
        found |= matched
    return found


def _named(names: Mapping[str, str], chosen: str | list[str], **narrowing: Any) -> set[str]:
    """Those of some names, given with their paths, that are chosen in any form, as PEFT chooses.

    The forms are with what ``torch.compile`` adds and without, of a parameter of experts also the experts' name.
    """
    config, found = LoraConfig(target_modules=chosen, **narrowing), set()
    for name, path in names.items():
        forms = (name, clean_path(name), *([clean_path(path)] if name != path else []))
        if any(check_target_module_exists(config, form) for form in dict.fromkeys(forms)):
            found.add(name)
    return found


def _adaptable_of(model: nn.Module, names: Mapping[str, str], entry: str | list[str], matched: set[str]) -> set[str]:
    """What takes an adapter of what one expression names; what does not is told, and left out.

    Where it names nothing else all stays, to be refused by name.
    """
    modules = {name: model.get_submodule(name) for name in names if name in matched and name == names[name]}
    others = {name: module for name, module in modules.items() if not _takes_adapter(module)}
    if len(others) == len(matched):
        return matched
    kinds: dict[str, list[str]] = {}
    for name, module in others.items():
        if own_parameters(module) or not list(module.children()):  # what holds others is told by these
            kinds.setdefault(type_name(module), []).append(clean_path(name))
    if kinds:
        text = ", ".join(f"{n[0]!r} ({kind}{f', and {len(n) - 1} more' if n[1:] else ''})" for kind, n in kinds.items())
        warn(
            f"target_modules: {_said(entry)} also matches what no adapter goes with, which is left out: {text}",
        )
    return matched - others.keys()


def _takes_adapter(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))


def nameable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What can be named of a model: modules, and in the place of experts each of their parameters; with the paths."""
    for path, module in model.named_modules():
        if uncompiled(module) is not module:
            continue  # what is compiled comes next, by a path that it alone has
        experts = expert_parameters(module)
        for name in [f"{path}.{parameter}" for parameter in experts] or [path]:
            if clean_path(path):
                yield name, path


def _forms(name: str, path: str) -> Iterator[str]:
    """By what a module is named: with what ``torch.compile`` adds and without; a parameter also as its experts are."""
    yield from dict.fromkeys((name, clean_path(name), *([clean_path(path)] if name != path else [])))


def by_pattern(pattern: Mapping[str, Any] | None, names: Iterable[str], default: Any) -> Any:
    """The number that ``rank_pattern`` or ``alpha_pattern`` gives to one of some names, the first that it knows.

    Names are also known without what ``torch.compile`` adds.
    """
    pattern = pattern or {}
    forms = (form for name in names for form in dict.fromkeys((name, clean_name(name))))
    return next((pattern[key] for f in forms if (key := get_pattern_key(list(pattern), f)) in pattern), default)


def warn_of_unmatched(option: str, pattern: Mapping[str, Any] | None, names: Iterable[str]) -> None:
    """Warn of keys of ``rank_pattern`` or ``alpha_pattern`` that name none of the layers, as PEFT does."""
    forms = {form for name in names for form in (name, clean_name(name))}
    left = [key for key in pattern or () if not any(get_pattern_key([key], form) == key for form in forms)]
    warn(f"{option}: {left} match no layer that gets an adapter" if left else "")


PARTS = ("bias", "norm", "head", "embedding")


def check_parts(train: Iterable[str]) -> tuple[str, ...]:
    """The parts to train, in a fixed order.

    Raises:
        TypeError: a bare string.
        ValueError: an unknown part.
    """
    if isinstance(train, str):
        raise TypeError(f"train must be a sequence, got the string {train!r}; write train=({train!r},)")
    train = tuple(train)
    unknown = [part for part in train if part not in PARTS]
    if unknown:
        raise ValueError(f"train={train!r} has the unknown part {unknown[0]!r}; it takes any of {PARTS}")
    return tuple(part for part in PARTS if part in train)


def select_parameters(model: nn.Module, train: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of the given parts.

    Args:
        model: A plain model, before any adapter.
        train: Any of ``"bias"`` (every bias, see `lightning_prune.naming.is_bias`), ``"norm"`` (the parameters of
            normalization layers), ``"head"`` (the output embeddings; of a model without any, its classifier) and
            ``"embedding"`` (all embeddings).

    Returns:
        Parameters by name, each once; a part that the model does not have adds nothing, except that a missing head
        is an error. A head tied to the embedding is one parameter with it. Of a part of which some require gradients
        the others are left out: those of a frozen teacher, or of frozen layers.

    Raises:
        TypeError, ValueError: an unknown part, or ``"head"`` of a model without one.
    """
    parts = check_parts(train)
    wanted: set[nn.Parameter] = set()
    for part in parts:
        found = list(_parameters_of(model, part))
        wanted.update([p for p in found if p.requires_grad] or found)
    return {name: p for name, p in model.named_parameters() if p in wanted}


def _parameters_of(model: nn.Module, part: str) -> Iterator[nn.Parameter]:
    if part == "head":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        if isinstance(head, nn.Module):
            yield from head.parameters()
            return
        found = [p for name, p in model.named_parameters() if is_head(name)]
        if not found:
            raise ValueError(
                f"train has 'head', but {type(model).__name__} has no output embeddings, and nothing that is called as "
                "a classifier is ('classifier', 'score', 'head', ...); leave it out"
            )
        yield from found
        return
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (
                (part == "bias" and is_bias(name))
                or (part == "norm" and is_norm(module))
                or (part == "embedding" and isinstance(module, nn.Embedding))
            ):
                yield parameter


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: by its name, since every family of transformers has an RMSNorm of its own."""
    own = list(module.parameters(recurse=False))
    return bool(own) and "norm" in type_name(module).lower() and all(p.dim() <= 1 for p in own)


# Of adapters in single blocks: names of whole models do not match there, and dropout is off.
_REFUSED = ("rank_pattern", "alpha_pattern", "lora_dropout")
_EITHER = (("steps", "epochs", 100), ("learning_rate", "relative_rate", 1e-3))  # and such as, of the first
_CHOICES = {"window": ("block", "half"), "teacher": ("dense", "pruned")}


@dataclass(frozen=True)
class ReconstructSettings:
    """What `reconstruct` does; its options by name.

    Attributes:
        train: What is trained of a window. Any of ``"bias"`` and ``"norm"``, beside the adapters; or ``"all"``: every
            weight that pruning could take and has kept, biases and norms, without adapters.
        adapter: ``"mask_lora"``, ``"scale_lora"``, ``"hira"``, ``"lora_prune"``, or None to train `train` alone.
        window: What is fitted at a time: ``"block"``, or ``"half"``: attention with its norm and residual, then the
            MLP on the outputs of the fitted attention. Blocks whose attention and MLP run side by side stay whole.
        steps: Optimizer steps for each window, passing over the batches in a new order each time. None: `epochs`.
        epochs: Passes over the batches for each window. None: `steps`.
        batch_size: Samples a step, into which batches are taken apart where that can be done. None: as given.
        learning_rate: Peak learning rate. None: `relative_rate`.
        relative_rate: Peak learning rate as a share of the root mean square of each parameter's values other than zero,
            since weights are ten times as large in one model as in another. None: `learning_rate`.
        num_samples: Calibration samples.
        teacher: What the dense window is given to compute the targets from. ``"dense"``: what it is given in the dense
            model, so that a window also undoes errors of those before it. ``"pruned"``: what the pruned window is
            given, so that each stands for itself. Of several stacks (encoder and decoder) each begins with what the
            fitted stacks before it give it, in both cases.
        share: How far each weight goes, when all windows are done, from where it was to where its fit ended, in
            ``(0, 1]``: a fit of few samples has fitted them too well at its end. The errors of windows are those of
            the fits.
        offload: Device where hidden states wait, such as ``"cpu"``; default the model's.
        lora_options: Of the adapters.

    Raises:
        TypeError, ValueError: a value that no model could take.
    """

    train: str | tuple[str, ...] = ("bias", "norm")
    adapter: str | None = "mask_lora"
    window: str = "block"
    steps: int | None = 100
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = 1e-3
    relative_rate: float | None = None
    num_samples: int = 128
    teacher: str = "dense"
    share: float = 1.0
    offload: torch.device | str | None = None
    lora_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any], argument: str = "reconstruct") -> ReconstructSettings:
        """Complete and check options by name, where those of LoRA stand beside the others.

        With ``train="all"`` the defaults are half blocks, one pass with 2 samples a step, a relative rate, and half of
        the way.
        """
        own = {f.name for f in fields(cls)} - {"lora_options"}
        given = {name: value for name, value in options.items() if name in own}
        lora = {name: value for name, value in options.items() if name not in own}
        unknown = [name for name in lora if name not in OPTIONS and name not in _REFUSED]
        if unknown:
            near = difflib.get_close_matches(unknown[0], (*own, *OPTIONS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes any of {', '.join(sorted(own))}"
            raise TypeError(f"{argument} has the unknown option {unknown[0]!r}; {hint}")
        if given.get("train") == "all":
            everything = {"adapter": None, "window": "half", "epochs": 1, "batch_size": 2, "share": 0.5}
            given = {**everything, "relative_rate": 0.005, **given}
        for pair in (names[:2] for names in _EITHER):  # what is said stands in place of the other's default
            for one, other in (pair, pair[::-1]):
                if given.get(one) is not None and other not in options:
                    given[other] = None
        return cls(**given, lora_options=lora)

    def __post_init__(self) -> None:
        check_adapter(self.adapter)
        check_options(self.adapter, self.lora_options)
        if self.adapter == "lora":
            raise ValueError(
                "adapter='lora' cannot be merged, since its product is dense, and each block is merged before the next "
                "begins; use adapter='mask_lora'"
            )
        if self.train == "all" and self.adapter is not None:
            raise ValueError(
                f"adapter={self.adapter!r} with train='all', which trains every kept weight itself: remove adapter, or "
                "name parts, such as train=('bias', 'norm')"
            )
        if self.train != "all":
            object.__setattr__(self, "train", check_parts(self.train))
            outside = [part for part in self.train if part not in ("bias", "norm")]
            if outside:
                raise ValueError(
                    f"train={self.train!r}: {outside[0]!r} is in no decoder block; use 'bias' and 'norm', or 'all'"
                )
            if self.adapter is None and not self.train:
                raise ValueError(
                    "adapter=None with an empty train leaves nothing to fit in a decoder block: name 'bias' or 'norm', "
                    "or use train='all' (reconstruct={'train': 'all'} of PERPRetraining)"
                )
        for name in _REFUSED:
            if self.lora_options.get(name):
                raise ValueError(f"{name}={self.lora_options[name]!r} is not supported block by block; remove it")
        for one, other, such in _EITHER:
            mine, others = getattr(self, one), getattr(self, other)
            if (mine is None) == (others is None):
                raise ValueError(f"{one}={mine!r} and {other}={others!r}: give one of them, such as {one}={such}")
        for name, least in (("steps", 100), ("epochs", 1), ("batch_size", 2), ("num_samples", 128)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
            if not whole and (value is not None or name == "num_samples"):
                raise ValueError(f"{name}={value!r} must be an integer >= 1, below 2**31, such as {least}")
        if self.relative_rate is not None and self.adapter is not None:
            raise ValueError(
                f"relative_rate={self.relative_rate!r} with adapter={self.adapter!r}, which begins at zero and has no "
                "size of its own: use learning_rate, or train='all'"
            )
        for name, such in (("learning_rate", 1e-3), ("relative_rate", 0.005)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{name}={value!r} must be a number above 0, such as {such}")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ValueError(f"share={self.share!r} must be a number in (0, 1], such as 0.5")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}")

    def options(self) -> dict[str, Any]:
        """Return what `of` makes these settings from."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lora_options"}
        return {**own, **self.lora_options}

    @property
    def rate(self) -> str:
        """What a fit that diverged says of the rate."""
        name = "learning_rate" if self.relative_rate is None else "relative_rate"
        return f"{name} below {getattr(self, name)}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are trained beside weights or adapters."""
        return ("bias", "norm") if isinstance(self.train, str) else self.train
