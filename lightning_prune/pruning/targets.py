"""Which weights are pruned: the layers, their parameter names, and their view as a matrix ``(out, in)``.

Dimensions: I inputs, O outputs of a layer.
"""

from __future__ import annotations

import difflib
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import is_pruned
from torch.optim.swa_utils import AveragedModel

from lightning_prune.errors import refuse_inference_tensors
from lightning_prune.naming import (
    HEADS,
    and_alike,
    clean_name,
    has_class,
    is_head,
    name_matches,
    own_parameters,
    plain_name,
    to_ignore,
)
from lightning_prune.pruning.clearing import to_bytes, zero_pruned_
from lightning_prune.pruning.experts import ExpertMatrix
from lightning_prune.pruning.layer_kinds import (
    ATTENTION_MATRICES,
    EXPERT,
    EXPERT_TRANSPOSED,
    INNER,
    LINEAR,
    PROJECTION,
    LayerKind,
    embeds,
    packed_layers,
    stored_weights,
)
from lightning_prune.pruning.offloading import at_hand, device_of, is_offloaded
from lightning_prune.pruning.patterns import lowest_in_layer, lowest_over_ranks
from lightning_prune.pruning.projections import OUTPUT, Projection, can_be_written_out, output_layer
from lightning_prune.pruning.zeros import CONVOLUTIONS, keeps_zeros
from lightning_prune.ranks import Ranks
from lightning_prune.sharding import (
    Layout,
    RowsLayout,
    SliceLayout,
    StackLayout,
    as_shard_of,
    gather_whole,
    local,
    memory_of,
    packed_class,
    type_name,
)

DEFAULT_IGNORE = HEADS
"""Output layers, left alone unless `targets` names them; see `lightning_prune.naming.is_head`."""

# Why layers that could be pruned are left alone by default.
HEAD, ROUTER, FROZEN = "head", "router", "frozen"
# And where statistics are read, which do not know them.
FUNCTIONAL, GROUPED = "used functionally", "grouped convolution"
# Models of state spaces multiply with it by themselves, and their layers never run.
DEPTHWISE = "depthwise Conv1d"
# And always: there would be no zeros in what it computes with.
STANDARDIZED = "its forward makes other numbers of zeros (weight standardization?)"
# Why others are left alone.
IGNORED, NOT_NAMED = "in ignore", "not in targets"
PARAMETRIZED = "its weight is no parameter, but made of others (weight_norm?)"

RETRAINING = "_lightning_prune_perp"
"""Attribute of a model, or of one inside a PEFT model, that is retrained while its weights are frozen."""


@dataclass(frozen=True)
class Target:
    """One weight to prune.

    Attributes:
        name: The parameter's name in the model, without the prefixes of ``torch.compile``.
        module: The layer. The weight is read from it each time: a parameter may be replaced (sharding).
        kind: How the layer stores its weight.
        modules: All layers that use this one parameter (more than one where layers are tied).
        attribute: What `module` calls the parameter.

    Of a sharded parameter (DTensor), `matrix` is this rank's part; `shape` and `numel` are of the whole. One that is
    offloaded is brought to where its layer runs for the time of a call.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    modules: tuple[nn.Module, ...]
    attribute: str = "weight"

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now."""
        weight = getattr(self.module, self.attribute)
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the matrix."""
        return self.layout.shape

    @property
    def groups(self) -> int:
        """Of a convolution in how many groups of rows, each of which meets other inputs; else 1."""
        return self.module.groups if isinstance(self.module, CONVOLUTIONS) else 1

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        return device_of(self.module, self.weight)

    @property
    def offloaded(self) -> bool:
        """Whether the weight is kept elsewhere than where the layer runs."""
        return is_offloaded(self.module)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.weight.numel()

    @property
    def layout(self) -> Layout:
        """Where the parts of the matrix are."""
        return Layout(self.weight, self.kind.transposed)

    @property
    def parameter(self) -> str:
        """The name of the parameter, by which its mask is kept."""
        return self.name

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        """The modules of the model that hold the parameter."""
        return tuple(vars(module).get("holder", (module,))[0] for module in self.modules)

    def stored(self, tensor: Tensor) -> Tensor:
        """What is here of the weight in a tensor of the parameter's shape and layout, as the parameter stores it."""
        return local(tensor)

    def matrix(self) -> Tensor:
        """The weight as ``(O, I)``, or this rank's part of it; detached, in its own dtype."""
        with at_hand(self.module):
            return self.part(self.weight.detach())

    def part(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape and layout as a matrix, as `matrix` gives the weight."""
        return self.kind.to_matrix(self.stored(tensor))

    def rows(self, part: Tensor | None = None) -> Tensor:
        """Whole rows ``[r, I]`` of the weight, or of what has the form of `matrix`; parts change ranks if need be."""
        return self.layout.to_rows(self.matrix() if part is None else part)

    def whole(self, part: Tensor) -> Tensor:
        """All of a matrix on every rank, ``[O, I]``, from this rank's part of it."""
        return self.kind.to_matrix(gather_whole(self.to_parameter(part)))

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """A matrix, shaped as `matrix` gives it, back to the parameter's shape and layout."""
        weight = self.weight
        return as_shard_of(weight, self.kind.from_matrix(matrix, local(weight).shape).contiguous())

    def write(self, matrix: Tensor) -> None:
        """Overwrite the weight, or this rank's part of it."""
        with at_hand(self.module):
            own = self.stored(self.weight.detach())
            own.copy_(self.kind.from_matrix(matrix, own.shape))

    def mask(self, kept: Tensor) -> None:
        """Set weights to zero where a mask, shaped as `matrix` gives the weight, is False."""
        with at_hand(self.module):
            own = self.stored(self.weight.detach())
            zero_pruned_(own, to_bytes(self.kind.from_matrix(kept, own.shape), own.device))

    def lowest(self, ranks: Ranks | None) -> Callable[[Tensor, int], Tensor]:
        """Selection of the lowest scores within the whole matrix, from the `rows` of it that are here."""
        layout = self.layout
        if (spread := layout.if_spread(ranks)) is None:
            return lowest_in_layer
        first_row, counted = layout.row_bounds[0], layout.counted
        return lambda scores, count: lowest_over_ranks(scores, count, spread, first_row, counted)


class SliceTarget(Target):
    """A part of a parameter, to prune like the weight of a layer. Its modules are layers that stand in for it."""

    @property
    def weight(self) -> nn.Parameter:
        """The whole parameter, as it is now."""
        weight = self.modules[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def numel(self) -> int:
        """Number of weights of the part."""
        return self.shape[0] * self.shape[1]

    @property
    @abstractmethod
    def layout(self) -> SliceLayout:
        """Where the parts of the matrix are."""

    @property
    def parameter(self) -> str:
        """The name of the whole parameter."""
        return self.name.rpartition(".")[0]

    @abstractmethod
    def stored(self, tensor: Tensor) -> Tensor:
        """What is here of the part, in a tensor of the whole parameter's shape and layout."""

    def whole(self, part: Tensor) -> Tensor:
        """All of the matrix on every rank, ``[O, I]``, from this rank's part of it."""
        return self.layout.gather(part)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """The parameter's other slices are other targets': see `join_masks`.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name!r} is a slice of a parameter; join_masks makes one mask of all of them")


class ExpertTarget(SliceTarget):
    """One expert's slice of a 3-D parameter.

    Of a parameter that is sharded along its experts, a rank has the whole matrix or no row of it.
    """

    @property
    def layout(self) -> StackLayout:
        """Where the parts of the matrix are."""
        first = self.modules[0]
        assert isinstance(first, ExpertMatrix)
        return StackLayout(self.weight, self.kind.transposed, first.index)

    def stored(self, tensor: Tensor) -> Tensor:
        """What is here of the expert's slice, in a tensor of the parameter's shape and layout."""
        place, stack = self.layout.place, local(tensor)
        if place is not None:
            return stack[place]
        first, second = stack.shape[1:]
        return stack.new_empty((first, 0) if self.kind.transposed else (0, second))


class ProjectionTarget(SliceTarget):
    """The queries', keys' or values' rows of the matrix of a MultiheadAttention."""

    @property
    def layout(self) -> RowsLayout:
        """Where the parts of the matrix are."""
        first = self.modules[0]
        assert isinstance(first, Projection)
        return RowsLayout(self.weight, self.kind.transposed, *first.bounds)

    def stored(self, tensor: Tensor) -> Tensor:
        """What is here of the rows, in a tensor of the parameter's shape and layout."""
        start, stop = self.layout.places
        return local(tensor)[start:stop]


def parameters_of(targets: Sequence[Target]) -> dict[str, nn.Parameter]:
    """The parameters that some targets are, or are slices of, by name, each once."""
    return {name: target.weight for name, target in {t.parameter: t for t in targets}.items()}


def join_masks(targets: Sequence[Target], parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield masks of the parameters' shapes and layouts, with the parameters' names.

    Args:
        targets: All targets of the parameters.
        parts: The mask of each by its name, shaped as `Target.matrix` gives the weight.
    """
    users: dict[str, list[Target]] = {}
    for target in targets:
        users.setdefault(target.parameter, []).append(target)
    for name, (first, *others) in users.items():
        if not isinstance(first, SliceTarget):
            yield name, first.to_parameter(parts[name])
            continue
        weight = first.weight
        own = torch.ones(local(weight).shape, dtype=torch.bool, device=parts[first.name].device)
        for target in (first, *others):
            slice_ = target.stored(own)
            slice_.copy_(target.kind.from_matrix(parts[target.name], slice_.shape))
        yield name, as_shard_of(weight, own)


@dataclass(frozen=True)
class _Candidate:
    """A weight that could be pruned.

    Attributes:
        module: What holds it.
        parameter: Its name there.
        kind: How it is stored.
        attention: What multiplies with it, if its own module does not and can be written out.
    """

    module: nn.Module
    parameter: str = "weight"
    kind: LayerKind = LINEAR
    attention: nn.MultiheadAttention | None = None

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter; None where a layer keeps it in another form."""
        return own_parameters(self.module).get(self.parameter)


def _candidates(model: nn.Module, adapters: Collection[nn.Module]) -> dict[str, _Candidate]:
    """The weights of a model that could be pruned: by the clean name of their layer, or of the parameter in others."""
    found = {}
    attentions: dict[nn.Module, nn.MultiheadAttention] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and can_be_written_out(module):
            attentions |= {module: module, output_layer(module): module}
        if module in adapters:
            continue
        for parameter, kind in stored_weights(module).items():
            name = path if parameter == "weight" else f"{path}.{parameter}" if path else parameter
            found[clean_name(name)] = _Candidate(module, parameter, kind, attentions.get(module))
    return found


@dataclass(frozen=True)
class Selection:
    """The layers of a model, divided.

    Attributes:
        targets: One entry a parameter to prune, in the model's order; layers that share one share the entry.
        left_out: Layers that could be pruned and are left alone, by clean name, and why.
        adapters: Modules of adapters beside a PEFT ``base_layer``.
    """

    targets: list[Target]
    left_out: dict[str, str] = field(default_factory=dict)
    adapters: frozenset[nn.Module] = frozenset()


def find_targets(
    model: nn.Module,
    targets: Sequence[str | type[nn.Module]] | None = None,
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE,
    frozen: bool = False,
    parametrized: bool = True,
) -> list[Target]:
    """Find the weights to prune.

    Left alone by default are output layers, also those tied to embeddings; routers of experts; and frozen layers. A
    layer is frozen if its weight requires no gradient while another parameter of the model does, and it is not the
    base of an adapter; in a model of PERP, what counts is which required one before. What is named in `targets` is
    pruned all the same: by a selector that matches nothing but heads, or routers, or frozen layers. Where heads are
    all there is, they are pruned. Layers that standardize their weight are always left alone, since they would compute
    with other numbers in the place of zeros.

    Args:
        model: Any module.
        targets: Layer types, type names, or patterns of module names (``"q_proj"``, ``"layers.0.*"``).
            Default: every Linear, Conv1D (transformers), Conv1d to Conv3d, experts, and the matrices inside of
            MultiheadAttention, LSTM, GRU and RNN.
        ignore: The same, left out. Default: output layers by the names that transformers gives them
            (`DEFAULT_IGNORE`), which are left out beside other layers that are named here too; with ``[]`` they are
            pruned. Embeddings, norms and biases are never pruned; of a PEFT layer only the base layer is.
        frozen: Whether to take frozen layers like others, for what trains them by adapters.
        parametrized: Whether to refuse layers whose weight is made of others (``weight_norm``). False: leave them out,
            where what has been pruned is looked for, of which they cannot be, unless ``torch.nn.utils.prune`` made it.

    Returns:
        One entry a parameter, in the model's order; layers that share a parameter share the entry. Layers without any
        weights, such as ``Linear(16, 0)``, have none.

    Raises:
        ValueError: nothing is left to prune; a pattern matches no layer; a weight is also used by a module
            that is not a target (tied embeddings), is quantized, parametrized, or has no data (meta device).
    """
    return select_layers(model, targets, ignore, frozen=frozen, parametrized=parametrized).targets


def select_layers(
    model: nn.Module,
    targets: Sequence[str | type[nn.Module]] | None = None,
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE,
    called: bool = False,
    hessian: bool = False,
    frozen: bool = False,
    offloaded: bool = False,
    parametrized: bool = True,
) -> Selection:
    """Divide the layers of a model as `find_targets` does, and say why the others are left alone.

    Args:
        model: Any module.
        targets: See `find_targets`.
        ignore: See `find_targets`.
        called: Whether layers must run as modules, because statistics are read from their inputs and outputs.
        hessian: Whether Hessians are among these; a grouped convolution has one in each group.
        frozen: See `find_targets`.
        offloaded: Whether to take weights that a `device_map` keeps in main memory or on disk.
        parametrized: See `find_targets`.

    Raises:
        ValueError, TypeError: see `find_targets`.
    """
    reject_bare_string("targets", targets)
    reject_bare_string("ignore", ignore)
    adapters = adapter_modules(model)
    layers = _candidates(model, adapters)
    if targets is not None:
        _require_matches("targets", targets, layers, model)
    # Who leaves out one more layer does not ask for heads to be pruned: only an empty `ignore` does.
    without_heads, repeated = bool(ignore), set(DEFAULT_IGNORE) <= set(ignore)
    ignored = [s for s in ignore if not (repeated and s in DEFAULT_IGNORE)]
    # A default name that a user repeats need not be there.
    if required := [s for s in ignored if s not in DEFAULT_IGNORE]:
        everything = {clean_name(name): _Candidate(module) for name, module in model.named_modules()}
        _require_matches("ignore", required, everything | layers, model)
    aside = {name for name, layer in layers.items() if _selected(name, layer.module, ignored)}

    users = _users(model)
    reasons = _reasons(model, layers, users, without_heads, called, hessian)
    if frozen:
        reasons = {name: reasons[name] - {FROZEN} for name in layers}
    if targets is None:
        seen = [name for name in layers if not reasons[name] & {FUNCTIONAL, GROUPED, DEPTHWISE}]
        if seen and all(HEAD in reasons[name] for name in seen) and not packed_layers(model):
            reasons = {name: reasons[name] - {HEAD} for name in layers}
    else:
        for selector in targets:
            matched = {name for name, layer in layers.items() if _selected(name, layer.module, [selector])} - aside
            # A selector that matches other layers too names none of these: "q_proj" is no word for a frozen teacher.
            if matched:
                named = frozenset.intersection(*(reasons[name] for name in matched)) - {STANDARDIZED}
                reasons |= {name: reasons[name] - named for name in matched}
    left_out = {}
    for name, layer in layers.items():
        if targets is not None and not _selected(name, layer.module, targets):
            left_out[name] = sorted(reasons[name])[0] if reasons[name] else NOT_NAMED
        elif name in aside:
            left_out[name] = IGNORED
        elif reasons[name]:
            order = (STANDARDIZED, ROUTER, HEAD, FUNCTIONAL, GROUPED, DEPTHWISE, FROZEN)
            left_out[name] = next(reason for reason in order if reason in reasons[name])
        elif not parametrized and layer.weight is None and not is_pruned(layer.module):
            left_out[name] = PARAMETRIZED
    chosen = {name: layer for name, layer in layers.items() if name not in left_out and not _is_empty(layer)}
    if not chosen:
        raise ValueError(_nothing_to_prune(model, targets, ignore, left_out))
    if not offloaded and (away := [name for name, layer in chosen.items() if is_offloaded(layer.module)]):
        raise ValueError(
            f"the weight of {away[0]!r} is offloaded to main memory or disk (device_map), where only `prune` takes it; "
            "load the model without device_map"
        )
    return Selection(_group_by_parameter(model, chosen, users, called), left_out, frozenset(adapters))


def _nothing_to_prune(
    model: nn.Module, targets: object, ignore: Sequence[str | type[nn.Module]], left_out: dict[str, str]
) -> str:
    ignored = "the default" if ignore == DEFAULT_IGNORE else repr(ignore)
    text = (
        f"nothing to prune: targets={targets!r}, ignore={ignored} leave none of the {len(left_out)} linear, "
        f"convolution, attention, recurrent and expert weights of {type(model).__name__}"
    )
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        text += f"; {reason}: {', '.join(map(repr, names[:4]))}{', ...' if len(names) > 4 else ''}"
    others = Counter(
        type_name(m)
        for m in model.modules()
        if not stored_weights(m)
        and not embeds(m)
        and any(is_lazy(p) or p.dim() > 1 for p in own_parameters(m).values())
    )
    if others:
        text += f"; weights of other kinds are not pruned: {', '.join(f'{n} {kind}' for kind, n in others.items())}"
    packed = packed_layers(model)
    if packed:
        return f"{text}. {len(packed)} layers such as {packed[0][0]!r} are quantized: prune before quantizing"
    return (
        f"{text}. Widen `targets` or shorten `ignore`; heads, routers and frozen layers are pruned if `targets` names "
        "them"
    )


# -- what is left alone by default ------------------------------------------------------------------------------------


def _reasons(
    model: nn.Module, layers: dict[str, _Candidate], users: _Users, without_heads: bool, called: bool, hessian: bool
) -> dict[str, frozenset[str]]:
    """Why each layer is to be left alone by default; mostly for no reason."""
    inside = {id(layer.module) for layer in layers.values()}
    routers, frozen = _routers(model, layers), _frozen(model, layers)
    # Their parent reads their weights, and never calls them.
    outputs = {output_layer(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    functional = {
        layer.module
        for layer in layers.values()
        if called and layer.attention is None and (layer.kind is INNER or layer.module in outputs)
    }

    def tied(weight: nn.Parameter | None) -> bool:
        return weight is not None and any(id(m) not in inside and _is_embedding(m) for _, m in users.get(weight, ()))

    return {
        name: frozenset(
            reason
            for reason, holds in (
                (HEAD, without_heads and (is_head(name) or tied(layer.weight))),
                (ROUTER, name in routers),
                (FROZEN, name in frozen),
                (FUNCTIONAL, layer.module in functional),
                (GROUPED, hessian and isinstance(layer.module, CONVOLUTIONS) and layer.module.groups > 1),
                (DEPTHWISE, called and _is_depthwise(layer.module)),
                (STANDARDIZED, isinstance(layer.module, (nn.Linear, *CONVOLUTIONS)) and not keeps_zeros(layer.module)),
            )
            if holds
        )
        for name, layer in layers.items()
    }


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and 1 < module.groups == module.in_channels


_ROUTER_NAME = re.compile(r"gate|gating|router|\w+_gate|\w+_router|gate_network")
_ROUTER_TYPE = re.compile(r"Router|Gat(e|ing)(?![a-z])")


def is_router(module: nn.Module) -> bool:
    """Whether the type of a module says that it chooses experts."""
    return type(module) is not nn.Linear and _ROUTER_TYPE.search(type_name(module)) is not None


def _routers(model: nn.Module, layers: dict[str, _Candidate]) -> set[str]:
    """Layers that choose experts: by their type, or by their name beside a module or parameter named ``experts``."""
    beside: set[nn.Module] = set()
    for parent in model.modules():
        children = dict(parent.named_children())
        if any("experts" in name for name in (*children, *own_parameters(parent))):
            beside.update(
                part for name, child in children.items() if _ROUTER_NAME.fullmatch(name) for part in child.modules()
            )
    return {name for name, layer in layers.items() if layer.module in beside or is_router(layer.module)}


def _frozen(model: nn.Module, layers: dict[str, _Candidate]) -> set[str]:
    """Layers whose weight requires no gradient, in a model that trains something else."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return set()  # loaded for inference: it says nothing
    # PEFT and PERP freeze what they retrain by other means, PERP with a note of what was trained until then.
    before = {
        parameter
        for parent in model.modules()
        if (trained := set(map(plain_name, getattr(parent.__dict__.get(RETRAINING), "required_grad", ()))))
        for name, parameter in parent.named_parameters()
        if plain_name(name) not in trained
    }
    retrained = {
        module
        for parent in model.modules()
        if (hasattr(parent, "peft_config") or RETRAINING in parent.__dict__)
        and any(parameter.requires_grad for parameter in parent.parameters())
        for module in parent.modules()
    }

    @cache
    def around() -> set[nn.Module]:
        # A quantized weight never requires a gradient: what counts is whether more than such layers is frozen
        # around it.
        weights = {p for layer in layers.values() for p in layer.module.parameters()}
        return {
            module
            for parent in model.modules()
            if not any(p.requires_grad for p in parent.parameters())
            and any(p not in weights for p in parent.parameters())
            for module in parent.modules()
        }

    def holds(layer: _Candidate) -> bool:
        module, weight = layer.module, layer.weight
        # Of modules with several matrices (attention, experts) each counts for itself.
        parts = module.named_parameters() if weight is None or layer.parameter == "weight" else [("", weight)]
        matrices = [p for n, p in parts if "bias" not in n]
        if any(p.requires_grad for p in matrices) or (module in retrained and before.isdisjoint(matrices)):
            return False
        return weight is None or _packed_form(weight) is None or module in around()

    return {name for name, layer in layers.items() if holds(layer)}


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Modules of adapters beside PEFT's ``base_layer``, of its prompts, and what adapters have put aside; averages."""
    adapters: set[nn.Module] = set()
    for parent in model.modules():
        if isinstance(parent, AveragedModel) and parent is not model:
            adapters.update(parent.modules())
        # Of prompt and prefix tuning: what makes the virtual tokens, with layers of its own.
        if hasattr(parent, "peft_config") and isinstance(prompt := getattr(parent, "prompt_encoder", None), nn.Module):
            adapters.update(prompt.modules())
        # PEFT's `modules_to_save`: the copy in use is what is trained and kept, the others never run.
        copies, original = (getattr(parent, name, None) for name in ("modules_to_save", "original_module"))
        if isinstance(copies, nn.ModuleDict) and isinstance(original, nn.Module):
            used = [copies[name] for name in getattr(parent, "active_adapters", ()) if name in copies]
            idle = {m for part in (original, *copies.values()) if used and part not in used for m in part.modules()}
            adapters.update(idle - {m for part in used for m in part.modules()})
        base = getattr(parent, "base_layer", None)
        # A module of a user's own may be called so too, beside layers that are no adapters.
        if isinstance(base, nn.Module) and (
            has_class(parent, "BaseTunerLayer") or any(name.startswith("lora_") for name, _ in parent.named_children())
        ):
            inside = set(base.modules())
            adapters.update(m for m in parent.modules() if m not in inside)  # a few of PEFT's wrappers are Linear
    return adapters


def _is_empty(layer: _Candidate) -> bool:
    """Whether a layer has no weights at all, as ``Linear(16, 0)``: nothing to prune, and no samples reach it."""
    weight = layer.weight
    return weight is not None and not is_lazy(weight) and not weight.numel() and not weight.is_meta


def reject_bare_string(argument: str, value: object) -> None:
    """Refuse a string in place of a sequence of them.

    Raises:
        TypeError: saying what to write.
    """
    if isinstance(value, str):
        raise TypeError(f"{argument} must be a sequence, got the string {value!r}; write {argument}=[{value!r}]")


def _selected(name: str, module: nn.Module, selectors: Sequence[str | type[nn.Module]]) -> bool:
    return any(
        (name_matches(name, s) or type_name(module) == s) if isinstance(s, str) else isinstance(module, s)
        for s in selectors
    )


def _require_matches(
    argument: str, selectors: Sequence[str | type[nn.Module]], layers: Mapping[str, _Candidate], model: nn.Module
) -> None:
    for selector in selectors:
        if not isinstance(selector, (str, type)):
            raise TypeError(f"{argument} takes module types and name patterns, got {selector!r}")
        if not any(_selected(name, layer.module, [selector]) for name, layer in layers.items()):
            others = [(clean_name(n), m) for n, m in model.named_modules() if _selected(clean_name(n), m, [selector])]
            found = ""
            if others:
                name, module = others[0]
                found = f" that can be pruned, only {name!r} ({type_name(module)})"
                if any(inside.startswith(f"{name}.") for inside in layers):
                    raise ValueError(
                        f"{argument}={selector!r} matches no layer{found}; {name!r} takes all layers in it"
                    )
            tails = {n.rsplit(".", 1)[-1] for n in layers}
            telling = sorted(tails - {""} or tails, key=lambda tail: (tail.isdigit(), tail))
            near = difflib.get_close_matches(str(selector), tails, n=3) or telling[:8]
            raise ValueError(
                f"{argument}={selector!r} matches no layer{found}; did you mean {', '.join(map(repr, near))}?"
            )


_Users = dict[nn.Parameter, list[tuple[str, nn.Module]]]


def _users(model: nn.Module) -> _Users:
    """Clean names and modules that hold each parameter; embeddings too that have the same memory."""
    # By the parameters, not by their ids: some modules make theirs anew, and ids of what is gone are given again.
    users: _Users = {}
    places: dict[Any, list[nn.Parameter]] = {}  # by where their data lie
    for name, module in model.named_modules():
        for parameter in own_parameters(module).values():
            if parameter not in users and (place := memory_of(parameter)) is not None:
                places.setdefault(place, []).append(parameter)
            users.setdefault(parameter, []).append((clean_name(name), module))
    # ``decoder.weight.data = embedding.weight.data`` makes two parameters of what is tied.
    for there in places.values():
        embeddings = [user for p in there for user in users[p] if _is_embedding(user[1])] if there[1:] else []
        for parameter in there if embeddings else ():
            users[parameter] += [user for user in embeddings if user not in users[parameter]]
    return users


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or "Embed" in type_name(module)


def _group_by_parameter(model: nn.Module, chosen: dict[str, _Candidate], users: _Users, called: bool) -> list[Target]:
    names = {p: clean_name(n) for n, p in model.named_parameters(remove_duplicate=True)}
    grouped: dict[nn.Parameter, list[tuple[str, _Candidate]]] = {}
    if computed := [name for name, layer in chosen.items() if layer.weight is None]:
        raise ValueError(
            f"the weight of {computed[0]!r} is not a plain parameter (weight_norm, spectral_norm, torch.nn.utils.prune "
            "or parametrize?); make it permanent first (prune.remove, remove_parametrizations), or add "
            f"{to_ignore(computed[0])}{and_alike(computed, chosen.keys() - computed)}"
        )
    for name, layer in chosen.items():
        grouped.setdefault(_checked_weight(name, layer), []).append((name, layer))

    found: list[Target] = []
    for weight, layers in grouped.items():
        if not (weight in users and weight in names):
            raise ValueError(
                f"{layers[0][0]!r} has another parameter each time it is looked at (as PEFT's LoRA of a "
                f"MultiheadAttention has), which no mask could follow: add {to_ignore(layers[0][0])}"
            )
        inside = {id(layer.module) for _, layer in layers}
        outside = [name for name, module in users[weight] if id(module) not in inside]
        if outside:
            raise ValueError(
                f"the weight of {layers[0][0]!r} is tied to {', '.join(map(repr, outside))}, which is not a "
                f"target: pruning one would prune both; untie them, or add {to_ignore(layers[0][0])}"
            )
        made = _targets_of(names[weight], [layer for _, layer in layers], called)
        if not made:
            names_of = [name for name, _ in layers]
            raise ValueError(
                f"tied layers of different types cannot be pruned: {names_of}; untie them, or add "
                f"{to_ignore(*names_of)}"
            )
        found.extend(made)
    return found


def _targets_of(name: str, users: Sequence[_Candidate], called: bool) -> Sequence[Target]:
    """The targets that one parameter makes; none, if its users do not store it alike."""
    first, kinds = users[0], {layer.kind for layer in users}
    if len(kinds) > 1:
        return []
    if first.kind in (EXPERT, EXPERT_TRANSPOSED):
        assert first.weight is not None
        matrices = [
            tuple(ExpertMatrix(user.module, user.parameter, index, first.kind.transposed) for user in users)
            for index in range(len(first.weight))
        ]
        return [ExpertTarget(f"{name}.{i}", first.module, first.kind, slices) for i, slices in enumerate(matrices)]
    written_out = called and any(user.attention is not None for user in users)
    if written_out and first.parameter == "in_proj_weight":
        return [
            ProjectionTarget(f"{name}.{letter}", first.module, PROJECTION, tuple(_stand_in(u, i) for u in users))
            for i, letter in enumerate("qkv")
        ]
    modules = tuple(_stand_in(u, OUTPUT) if written_out else u.module for u in users)
    kind = PROJECTION if written_out and first.kind is INNER else first.kind
    return [Target(name, first.module, kind, modules, first.parameter)]


def _stand_in(user: _Candidate, index: int) -> nn.Module:
    """What runs when a weight is multiplied with: its layer, or a projection in the place of one."""
    if user.attention is None:
        return user.module
    index = ATTENTION_MATRICES.index(user.parameter) - 1 if user.parameter in ATTENTION_MATRICES[1:] else index
    return Projection(user.attention, index)


def _checked_weight(name: str, layer: _Candidate) -> nn.Parameter:
    weight = layer.weight
    assert weight is not None
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"the weight of {name!r} has no shape yet (lazy layer); run the model once first")
    if weight.is_complex():
        raise ValueError(
            f"the weight of {name!r} is {weight.dtype}: scores compare real numbers, so complex weights are not "
            f"pruned; add {to_ignore(name)}"
        )
    form = _packed_form(weight)
    if form is not None:
        raise ValueError(
            f"the weight of {name!r} is quantized ({form}); prune before quantizing, or add {to_ignore(name)}"
        )
    if weight.layout is not torch.strided:
        raise ValueError(
            f"the weight of {name!r} is stored as {weight.layout}; make it dense first (to_dense), or add "
            f"{to_ignore(name)}"
        )
    if any(step == 0 and size > 1 for step, size in zip(local(weight).stride(), local(weight).shape, strict=True)):
        raise ValueError(
            f"the weight of {name!r} is an expanded tensor, whose rows or columns are the same memory: copy it first "
            f"(nn.Parameter(weight.detach().clone())), or add {to_ignore(name)}"
        )
    refuse_inference_tensors([(name, weight)])
    if weight.is_meta and not is_offloaded(layer.module):
        raise ValueError(f"the weight of {name!r} has no data (meta device); load or initialize the model first")
    return weight


# Parameters of other packages that are packed when they are moved to a GPU.
_PACKED_TYPES = ("Params4bit", "Int8Params", "GGUFParameter")


def _packed_form(weight: Tensor) -> str | None:
    """In which form a weight holds something else than one plain number an element, or None."""
    weight = local(weight)
    kind = type(weight).__name__
    if packed_class(weight) is not None or kind in _PACKED_TYPES:
        return f"{kind}, {weight.dtype}"
    return None if weight.is_floating_point() and weight.dtype.itemsize > 1 else str(weight.dtype)
