"""Say which units a model has, which rows and columns belong to each, and which of them may go."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.naming import clean_name, clean_path, own_parameters, uncompiled
from lightning_prune.pruning.experts import expert_parameters
from lightning_prune.pruning.layer_kinds import layer_kind
from lightning_prune.sharding import memory_of, packed_class, plain_class, type_name
from lightning_prune.structure.classes import is_own_class
from lightning_prune.structure.families import Family, find_family
from lightning_prune.structure.sizes import (
    ATTENTION_UNITS,
    IN_LAYERS,
    SIZE_NAMES,
    UNIT_TYPES,
    AttentionUnit,
    Shapes,
    Sizes,
)

_V = TypeVar("_V")
Removal = dict[str, list[Tensor]]
"""Units to remove by type: sorted indices, int64; one tensor a layer for types of `IN_LAYERS`, else one tensor."""


@dataclass(frozen=True)
class Slice:
    """What units of one type occupy in one parameter.

    Attributes:
        name: The parameter's name in the transformers model.
        dim: Dimension of the parameter that the units lie along.
        indices: ``[U, M]``, int64: the M rows (or columns) of each unit. Units are disjoint and fill the dimension,
            except where queries, keys and values share one.
    """

    name: str
    dim: int
    indices: Tensor


@dataclass(frozen=True)
class Structure:
    """A model's family, sizes and units.

    Attributes:
        model: The transformers model.
        family: Its table.
        sizes: Its sizes.
        attention_unit: ``"group"`` or ``"head"``, see `read_structure`.
        axes: Axis of every dimension, by parameter name; a tied parameter once. Names are those of the transformers
            model, without what ``torch.compile`` adds.
        lengths: Shape by parameter name.
        prefix: What the transformers model is called in the module that was given; empty, or ends with a dot.
    """

    model: nn.Module
    family: Family
    sizes: Sizes
    attention_unit: AttentionUnit
    axes: Mapping[str, tuple[str, ...]]
    lengths: Mapping[str, torch.Size]
    prefix: str

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name, as they are now."""
        return {clean_name(name): p for name, p in self.model.named_parameters()}

    def module(self, name: str) -> nn.Module:
        """A module by its clean name."""
        return self.modules()[name]

    def modules(self) -> dict[str, nn.Module]:
        """Modules by clean name; of wrappers and what they wrap, what is wrapped."""
        return {clean_name(name): module for name, module in self.model.named_modules()}

    def layer_names(self) -> list[str]:
        """Names of the decoder layers."""
        return [f"{self.family.layers}.{i}" for i in range(self.sizes.num_hidden_layers)]

    def in_layer(self, index: int) -> list[str]:
        """Names of the parameters of a layer."""
        return list(self._by_layer.get(str(index), ()))

    @cached_property
    def _by_layer(self) -> dict[str, list[str]]:
        """Names of the parameters of each layer by its number, found in one go: most who ask do so for every layer."""
        prefix, found = f"{self.family.layers}.", dict[str, list[str]]()
        for name in self.axes:
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)
        return found

    def expert_names(self) -> list[str]:
        """Names of the modules that hold the experts of each layer."""
        prefix, modules = f"{self.family.layers}.", self.modules()
        return [name for name, module in modules.items() if name.startswith(prefix) and expert_parameters(module)]

    def norm_names(self) -> list[str]:
        """Names of the normalizations over the hidden channels, the final one last."""
        return [f"{layer}.{norm}" for layer in self.layer_names() for norm in self.family.norms] + [
            self.family.final_norm
        ]

    def units(self, unit_type: str) -> int:
        """Number of units of a type: in every layer for types of `IN_LAYERS`, in the model for others."""
        return self.sizes.units(unit_type, self.attention_unit)

    def places(self, unit_type: str) -> int:
        """Number of places that each have their own units of a type: layers for types of `IN_LAYERS`, else 1."""
        return self.sizes.num_hidden_layers if unit_type in IN_LAYERS else 1

    def slices(self, unit_type: str) -> list[list[Slice]]:
        """Slices of the units of a type, one list a place (see `places`).

        For ``"layer"`` there are none: a unit is all that `in_layer` names.
        """
        if unit_type == "layer":
            return [[]]
        by_axis = unit_indices(self.sizes, unit_type, self.attention_unit)
        places = [list(self.axes)] if unit_type == "hidden" else map(self.in_layer, range(self.places(unit_type)))
        return [
            [
                Slice(name, dim, by_axis[axis])
                for name in names
                for dim, axis in enumerate(self.axes[name])
                if axis in by_axis
            ]
            for names in places
        ]

    def unit_weights(self, unit_type: str) -> int:
        """Number of weights of one unit in one place: what its saliency is the mean over."""
        if unit_type == "layer":
            return sum(self.lengths[name].numel() for name in self.in_layer(0))
        return sum(
            self.lengths[s.name].numel() // self.lengths[s.name][s.dim] * s.indices.shape[1]
            for s in self.slices(unit_type)[0]
        )

    def shapes(self) -> Shapes:
        """For parameter counts of other sizes of this model."""
        inside, prefix = self.in_layer(0), f"{self.family.layers}."
        outside = [name for name in self.axes if not name.startswith(prefix)]
        return Shapes(tuple(map(self.axes_of, inside)), tuple(map(self.axes_of, outside)))

    def axes_of(self, name: str) -> tuple[str | int, ...]:
        """Axes of a parameter; a number where a dimension never shrinks."""
        return tuple(n if axis == "-" else axis for axis, n in zip(self.axes[name], self.lengths[name], strict=True))

    def readers(self, unit_type: str) -> list[list[str]]:
        """Names of the linear layers that take units of a type as inputs, one list a place.

        For attention the output projection, for ffn the down projection, for hidden all that read the hidden channels.
        """
        modules = self.modules()
        found = []
        for slices in self.slices(unit_type):
            names = []
            for s in slices:
                name, _, tail = s.name.rpartition(".")
                kind = layer_kind(modules[name]) if tail == "weight" else None
                if kind is not None and s.dim == (0 if kind.transposed else 1):
                    names.append(name)
            found.append(names)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if unit_type == "hidden" and head is not None and f"{self._name_of(head)}.weight" not in self.axes:
            found[0].append(self._name_of(head))  # tied: listed once, as the embedding
        return found

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, m in self.modules().items() if m is module)


# Types whose units are single indices.
_AXIS = {"ffn": "f", "hidden": "d", "expert": "x"}


def unit_indices(sizes: Sizes, unit_type: str, attention_unit: AttentionUnit = "group") -> dict[str, Tensor]:
    """Indices ``[U, M]`` of every unit along each axis that holds units of a type."""
    if unit_type in _AXIS:
        axis = _AXIS[unit_type]
        single = torch.arange(sizes.axis(axis), device="cpu")[:, None]
        return {axis: single, "ff": torch.cat([single, len(single) + single], dim=1)} if axis == "f" else {axis: single}
    k, g, e = sizes.num_key_value_heads, sizes.queries_per_group, sizes.head_dim
    rows = torch.arange(k * g * e, device="cpu")
    if attention_unit == "head":
        q = rows.view(k, g, e).transpose(0, 1).reshape(g, k * e)
        return {"q": q, "qkv": q}
    q, kv = rows.view(k, g * e), torch.arange(k * e, device="cpu").view(k, e)
    fused = torch.cat([q, k * g * e + kv, (k * g + k) * e + kv], dim=1)
    return {"q": q, "kv": kv, "qkv": fused, "heads": torch.arange(k * 3 * e, device="cpu").view(k, 3 * e)}


def find_language_model(module: nn.Module) -> tuple[str, nn.Module]:
    """The transformers model in a module, and its name there (empty if it is the module itself).

    Raises:
        ValueError: there is none, or more than one side by side.
    """
    found = language_models(module)
    if len(found) != 1:
        names = [name or type(m).__name__ for name, m in found]
        hint = "pass the causal language model itself"
        if found and hasattr(module, "training_step"):
            hint = (
                "pass a teacher as distill_from, and keep what else is no part of it out of the modules, such as in a "
                "list (self.other = [other])"
            )
        elif hasattr(module, "training_step"):
            hint = "build it in __init__, setup or configure_model, and keep it in an attribute"
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} transformers models{f' {names}' if names else ''}, one is "
            f"needed: {hint}"
        )
    return found[0]


def language_models(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformers models in a module that are in no other one, and their names there."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_modules():
        if hasattr(getattr(child, "config", None), "model_type") and hasattr(child, "get_output_embeddings"):
            inner = uncompiled(child)
            if not any(inner in set(outer.modules()) for _, outer in found):
                found.append((clean_path(name), inner))
    return found


def read_structure(module: nn.Module, attention_unit: AttentionUnit = "group") -> Structure:
    """The units of a transformers causal language model.

    Args:
        module: The model, or a module that holds it (a LightningModule).
        attention_unit: ``"group"``, the default: one key/value head with the query heads it serves; where there are
            as many key/value heads as query heads, that is one head. It shrinks keys and values too, and can go on
            until one group is left. ``"head"``: the same one query head of every group (h / k units a layer).

    Raises:
        ValueError: an architecture that is not known, or a parameter that its table does not describe (adapters,
            another head, quantized or packed weights), that not every layer has, or that two layers share.
    """
    if attention_unit not in ATTENTION_UNITS:
        raise ValueError(f"attention_unit={attention_unit!r} must be one of {ATTENTION_UNITS}")
    prefix, model = find_language_model(module)
    family = find_family(model)
    scaled = family.scaled_embedding
    if scaled is not None and not hasattr(model.get_submodule(scaled), "embed_scale"):
        raise ValueError(
            f"shrinking {family.model_type!r} needs transformers 5, whose {scaled} holds the factor that depends on "
            "the hidden size: install a newer one"
        )
    axes = _axes(model, family)
    _check_layers(model, f"{family.layers}.")
    lengths = {clean_name(name): p.shape for name, p in model.named_parameters()}
    sizes = _sizes(model, axes, lengths)
    structure = Structure(model, family, sizes, attention_unit, axes, lengths, f"{prefix}." if prefix else "")
    for name, shape in lengths.items():
        wanted = tuple(n if a == "-" else sizes.axis(a) for a, n in zip(axes[name], shape, strict=True))
        if tuple(shape) != wanted:
            raise ValueError(
                f"{name!r} has shape {tuple(shape)}, but the sizes of the model's configuration say {wanted}"
            )
    return structure


def _axes(model: nn.Module, family: Family) -> dict[str, tuple[str, ...]]:
    axes = {}
    for raw, p in model.named_parameters():
        name = clean_name(raw)
        entry, packed = _entry(family, name), packed_class(p)
        if entry is None or len(entry.split()) != p.dim() or not p.is_floating_point() or packed:
            raise ValueError(
                f"{name!r} ({p.dim()} dimensions, {packed or p.dtype}) is not in the description of the family "
                f"{family.model_type!r}: only a plain causal language model of it can be shrunk. Merge or remove "
                "adapters and dequantize; for another architecture see CONTRIBUTING.md, 'A family of your own'"
            )
        axes[name] = tuple(entry.split())
    for raw, module in model.named_modules():
        name = clean_name(f"{raw}.weight")
        if len((_entry(family, name) or "").split()) > 1 and "weight" not in own_parameters(module):
            raise ValueError(
                f"{name.removesuffix('.weight')!r} ({type_name(module)}) has no parameter 'weight', so it would keep "
                "its sizes while the others shrink: dequantize the model, if it keeps its weights in another form"
            )
    return axes


def _check_layers(model: nn.Module, prefix: str) -> None:
    """Refuse layers that share a parameter, whose units could not go from one alone, and layers that are not alike."""
    inside: dict[str, set[str]] = {}  # names of the parameters, by layer
    places: dict[Any, str] = {}
    for raw, p in model.named_parameters(remove_duplicate=False):
        name = clean_name(raw)
        if name.startswith(prefix):
            number, _, tail = name.removeprefix(prefix).partition(".")
            inside.setdefault(number, set()).add(tail)
            if (other := places.setdefault(memory_of(p) or id(p), name)) != name:
                raise ValueError(
                    f"{other!r} and {name!r} are one parameter, or two in the same memory, so units of one cannot go "
                    "alone: give each its own (nn.Parameter(weight.detach().clone())), or prune weights (prune)"
                )
    first = next(iter(inside.values()), set())
    for number, names in inside.items():
        if odd := sorted(names ^ first):
            raise ValueError(
                f"layers {next(iter(inside))} and {number} of {prefix.rstrip('.')!r} are not alike, as one alone has "
                f"{odd[0]!r}: all must have the parameters that the configuration says. Give it to all (a bias of "
                "zeros, where the configuration knows one), or take it away"
            )


def _entry(family: Family, name: str) -> str | None:
    """What a family's table says of a parameter."""
    prefix = f"{family.layers}."
    return (
        family.inside.get(name[len(prefix) :].partition(".")[2])
        if name.startswith(prefix)
        else family.outside.get(name)
    )


def _sizes(model: nn.Module, axes: Mapping[str, tuple[str, ...]], lengths: Mapping[str, torch.Size]) -> Sizes:
    def length(axis: str) -> int:
        return next((lengths[name][a.index(axis)] for name, a in axes.items() if axis in a), 0)

    config: Any = model.config
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    hidden = length("d")
    return Sizes(
        hidden_size=hidden,
        intermediate_size=length("f"),
        num_attention_heads=heads,
        num_key_value_heads=int(kv_heads),
        num_hidden_layers=int(config.num_hidden_layers),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        num_experts=length("x"),
        num_experts_per_tok=int(config.num_experts_per_tok) if length("x") else 0,
    )


def check_removal(structure: Structure, removal: Mapping[str, Any]) -> Removal:
    """A removal in its normal form: sorted int64 indices on the CPU, empty types left out.

    Args:
        structure: Of the model.
        removal: Unit indices by type: for types of `IN_LAYERS` one sequence or tensor a layer, of the same length in
            all; for hidden and layer one (a list with one tensor is taken too).

    Raises:
        ValueError: a type that is unknown or that the family does not lose, a wrong number of layers, unequal counts,
            an index that does not exist or comes twice, or too little left of a type.
    """
    if unknown := set(removal) - set(UNIT_TYPES):
        raise ValueError(f"removal has the unit types {sorted(unknown)}; known are {UNIT_TYPES}")
    check_unit_types(structure, list(removal))
    checked: Removal = {}
    for unit_type in UNIT_TYPES:
        if unit_type in removal:
            places = _checked_places(structure, unit_type, removal[unit_type])
            if places[0].numel():
                checked[unit_type] = places
    return checked


def _checked_places(structure: Structure, unit_type: str, given: Any) -> list[Tensor]:
    if structure.places(unit_type) == 1 and unit_type in ("hidden", "layer"):
        single = isinstance(given, (list, tuple)) and len(given) == 1 and isinstance(given[0], Tensor)
        given = [given[0] if single else given]
    places = [_indices(unit_type, indices) for indices in _several(unit_type, given)]
    units = structure.units(unit_type)
    if len(places) != structure.places(unit_type):
        raise ValueError(
            f"removal[{unit_type!r}] has {len(places)} entries; give one for each of the "
            f"{structure.places(unit_type)} layers"
        )
    if len({len(p) for p in places}) != 1:
        raise ValueError(
            f"removal[{unit_type!r}] removes {sorted({len(p) for p in places})} units from different layers: every "
            "layer must lose as many, since no class of this family reads sizes of single layers (per_layer_config)"
        )
    for p in places:
        if p.numel() and (int(p[0]) < 0 or int(p[-1]) >= units or bool((p[1:] == p[:-1]).any())):
            raise ValueError(f"removal[{unit_type!r}] has {p.tolist()}: units are 0 to {units - 1}, each at most once")
    if len(places[0]) > units - structure.sizes.least(unit_type):
        gone, least = f"all {units}" if len(places[0]) == units else len(places[0]), structure.sizes.least(unit_type)
        stay = "one must" if least == 1 else f"{least} must (num_experts_per_tok)"
        raise ValueError(f"removal[{unit_type!r}] removes {gone} units; at least {stay} stay")
    return places


def _several(unit_type: str, given: Any) -> Iterable[Any]:
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise ValueError(f"removal[{unit_type!r}]={given!r:.80} must be indices of units, for each layer")
    return given


def _indices(unit_type: str, given: Any) -> Tensor:
    """Sorted int64; neither truth values nor fractions, which would be read as other indices."""
    try:
        indices = torch.as_tensor(given, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"removal[{unit_type!r}] has {given!r:.80}, which are no indices of units: {error}") from error
    if indices.numel() and (indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex()):
        raise ValueError(
            f"removal[{unit_type!r}] has {str(indices.dtype).removeprefix('torch.')} values; it takes whole numbers, "
            "the indices of units that go (mask.nonzero().flatten() of a mask)"
        )
    return indices.to(torch.int64).sort().values


def check_data(structure: Structure) -> None:
    """Refuse parameters whose numbers are not here: what is written to them would be lost.

    Raises:
        ValueError: naming the first of them.
    """
    for name, p in structure.parameters().items():
        if p.is_meta:
            raise ValueError(
                f"{name!r} has no data here (meta device, or offloaded to main memory or disk by a device_map): load "
                "the whole model into memory, without offloading"
            )


def check_unit_types(structure: Structure, types: Sequence[str]) -> None:
    """Refuse unit types that a family cannot lose.

    Raises:
        ValueError: naming those it can.
    """
    if strange := [t for t in types if t not in structure.family.types]:
        raise ValueError(
            f"types={tuple(types)}: {structure.family.model_type!r} cannot lose units of {strange[0]!r}, only "
            f"{', '.join(map(repr, structure.family.types))}"
        )


def merge_removals(structure: Structure, *removals: Mapping[str, Any]) -> Removal:
    """The union of removals that number the units of the same model; units named twice count once."""
    merged: dict[str, list[Tensor]] = {}
    for removal in removals:
        for unit_type, places in check_removal(structure, removal).items():
            before = merged.get(unit_type, [torch.empty(0, dtype=torch.int64, device="cpu")] * len(places))
            merged[unit_type] = [torch.unique(torch.cat([a, b])) for a, b in zip(before, places, strict=True)]
    return check_removal(structure, merged)


def sizes_after(structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> Sizes:
    """Sizes of the model after a (checked) removal."""
    sizes = structure.sizes
    for unit_type, places in removal.items():
        # Groups keep their ratio, so the order of removals does not matter.
        sizes = sizes.without(unit_type, len(places[0]), structure.attention_unit)
    return sizes


def check_sizes(structure: Structure, sizes: Sizes) -> None:
    """Refuse sizes that no ordinary configuration of the family, or of the one it is saved as, can have.

    Raises:
        ValueError: naming the rule and what to remove instead.
    """
    family, heads, hidden = structure.family, sizes.num_attention_heads, sizes.hidden_size
    if family.heads_span_hidden and heads * sizes.head_dim != hidden:
        raise ValueError(
            f"{family.model_type!r} takes head_dim for hidden_size / num_attention_heads, so {heads} heads of "
            f"{sizes.head_dim} and a hidden size of {hidden} are no configuration of it: remove {sizes.head_dim} "
            "hidden channels with every head (attention), or ffn channels and layers alone"
        )
    if family.heads_divide_hidden and hidden % heads and needs_other_class(structure) is not None:
        raise ValueError(
            f"{family.model_type!r} refuses a hidden size ({hidden}) that its {heads} heads do not divide, and "
            f"{needs_other_class(structure)}, so the model cannot be saved as another family either: choose sizes that "
            "divide (round_to)"
        )
    if not (family.heads_divide_hidden and hidden % heads):
        _check_configuration(structure, sizes)


def _check_configuration(structure: Structure, sizes: Sizes) -> None:
    """Refuse sizes that the model's own configuration could not be saved or loaded with."""
    config: Any = copy.deepcopy(structure.config)
    write_sizes(config, structure, sizes, range(sizes.num_hidden_layers, structure.sizes.num_hidden_layers))
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # each family raises its own
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{structure.family.model_type!r} cannot be saved with the sizes {sizes.as_dict()}: {reason}. Remove ffn "
            "channels and layers alone, or hidden channels and heads in the ratio that they have"
        ) from error


def write_sizes(config: Any, structure: Structure, sizes: Sizes, removed_layers: Sequence[int] = ()) -> None:
    """Write sizes into a configuration; lists with one entry a layer lose those of removed layers."""
    family = structure.family
    for size in SIZE_NAMES:
        for name in family.fields_of(size):
            if getattr(sizes, size) and hasattr(config, name):
                setattr(config, name, getattr(sizes, size))
    if not family.heads_span_hidden:
        config.head_dim = sizes.head_dim
    for name in family.per_layer_fields:
        values = getattr(config, name, None)
        if isinstance(values, list):
            setattr(config, name, [v for i, v in enumerate(values) if i not in set(removed_layers)])


def check_layers_removable(structure: Structure) -> None:
    """Refuse the removal of layers where one computes something else under another number.

    Raises:
        ValueError: naming the field of the configuration.
    """
    matters = structure.family.layer_index_matters
    if matters and getattr(structure.config, matters, False):
        raise ValueError(
            f"layers cannot be removed with {matters}=True: a layer computes something else under another number"
        )


def needs_other_class(structure: Structure) -> str | None:
    """Why the model cannot be saved as the family its own stands in for; None if it can."""
    target = structure.family.saved_as
    if target is None:
        return "no other family has the same parameters"
    if is_own_class(structure.model):
        return f"it is a {plain_class(structure.model).__name__}, a class of your own"
    biases = [name for name in structure.axes if name.endswith(".bias")]
    return f"it has biases ({biases[0]})" if biases else None


@dataclass(frozen=True)
class KeptIndices:
    """What stays of a parameter: the dimension, and the indices along it, int64."""

    dim: int
    kept: Tensor
    gone: Tensor


def kept_indices(structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> dict[str, list[KeptIndices]]:
    """For every parameter that loses rows or columns, what stays along each dimension that shrinks."""
    found: dict[str, list[KeptIndices]] = {}
    for unit_type, places in removal.items():
        if unit_type == "layer":
            continue
        for slices, units in zip(structure.slices(unit_type), places, strict=True):
            for s in slices:
                gone = s.indices[units].reshape(-1).sort().values
                stays = torch.ones(structure.lengths[s.name][s.dim], dtype=torch.bool, device="cpu")
                stays[gone] = False
                found.setdefault(s.name, []).append(KeptIndices(s.dim, stays.nonzero().flatten(), gone))
    return found


def renumbered(values: Mapping[str, _V], layers: Sequence[str], gone: Sequence[int]) -> dict[str, _V]:
    """Return the values without those of removed layers, the others by their new names; `layers` as named before."""
    prefix, found = layers[0].rpartition(".")[0] + ".", {}
    stays = {str(old): str(new) for new, old in enumerate(i for i in range(len(layers)) if i not in gone)}
    for name, value in values.items():
        number, _, tail = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            found[name] = value
        elif number in stays:
            found[f"{prefix}{stays[number]}.{tail}"] = value
    return found
