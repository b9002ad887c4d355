"""Parameters that live as shards (DTensors of FSDP2 and tensor parallelism): who holds which part of a matrix.

A weight's matrix is ``(O, I)``. FSDP2 cuts a parameter along its first dimension, tensor parallelism cuts outputs
(colwise) or inputs (rowwise), and the two may meet in one parameter. Nothing here gathers more than one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parameter import is_lazy

_T = TypeVar("_T")

# Older versions of torch have them under the names that newer ones warn of.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    part = tensor.to_local()
    # An asynchronous collective may stand behind it.
    return cast(Tensor, part.wait()) if hasattr(part, "wait") else part


def packed_class(tensor: Tensor) -> str | None:
    """The class of a tensor that keeps its numbers in a form of its own, as torchao's quantized weights do; or None."""
    kind = type(local(tensor))
    return None if kind.__torch_dispatch__ is Tensor.__torch_dispatch__ else kind.__name__


def memory_of(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Where the numbers of a tensor, or of its part here, begin; None where it has none, or in a form of its own."""
    if is_lazy(tensor) or tensor.is_meta or packed_class(tensor) is not None:
        return None
    part = local(tensor.detach())
    return (part.device, part.data_ptr()) if part.numel() and part.layout == torch.strided else None


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over ranks."""
    return isinstance(tensor, DTensor)


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor now, or a module of FSDP2 will make it one."""
    return any(isinstance(p, DTensor) for p in model.parameters()) or any(
        isinstance(module, FSDPModule) for module in model.modules()
    )


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of one that FSDP2 shards, by making a subclass of it, the original class."""
    cls = type(module)
    return cls.__bases__[-1] if issubclass(cls, FSDPModule) and len(cls.__bases__) > 1 else cls


def type_name(module: nn.Module) -> str:
    """Name of a module's class, whether FSDP2 shards it or not."""
    return plain_class(module).__name__


def joins(model: nn.Module, main: bool) -> bool:
    """Whether a rank takes part in what is gathered from a model: the main one, and all where parameters are shards."""
    return main or has_sharded_parameters(model)


def refuse_shards(what: nn.Module | Tensor, message: str) -> None:
    """Refuse a model with sharded parameters, or a tensor that is a shard.

    Raises:
        ValueError: with the message.
    """
    if is_sharded(what) if isinstance(what, Tensor) else has_sharded_parameters(what):
        raise ValueError(message)


def refuse_shard_root(module: nn.Module, message: str) -> None:
    """Refuse a module that ``fully_shard`` was called on; one that is sharded as a part of another is let pass.

    Raises:
        ValueError: with the message.
    """
    if isinstance(module, FSDPModule):
        raise ValueError(message)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather the weights of a sharded model on the CPU of the first process; None where nothing is sharded.

    Every process must call; the others get an empty dictionary.
    """
    if not has_sharded_parameters(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def check_device(device_type: str) -> None:
    """Refuse what this PyTorch cannot shard on, before anything is sharded or computed.

    Raises:
        RuntimeError: FSDP2 on a CPU before torch 2.7, which fails in the first forward pass.
    """
    if device_type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise RuntimeError(
            f"FSDP2 on a CPU needs torch 2.7, here is {torch.__version__}: install a newer one, or train on an "
            "accelerator, or with strategy='ddp'"
        )


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Let FSDP2 take note of parameters as they will be trained, before anyone freezes them for a while.

    It does so once, at the start of the first forward pass; a group that is frozen then would reduce its gradients in
    the wrong dtype ever after. So every outermost sharded module passes through the start and the end of a forward
    pass here, without computing anything: its own parameters are gathered and let go, and every rank must call.
    """
    covered: set[nn.Module] = set()
    for module in model.modules():  # outer modules first: they take note of those within
        if isinstance(module, FSDPModule) and module not in covered:
            check_device(next((p.device.type for p in module.parameters()), "none"))
            covered.update(module.modules())
            pass_without_work(module)
            module.reshard()  # it stays gathered after a forward pass


def pass_without_work(module: Any) -> None:
    """Let a module of FSDP2 pass through start and end of a forward pass; every rank must call, or run the module."""
    module.pass_without_work = lambda argument: argument
    register_fsdp_forward_method(module, "pass_without_work")
    # On an accelerator FSDP2 moves the arguments, and some versions of it fail where there are none.
    module.pass_without_work(None)
    del module.pass_without_work


def gathering(module: nn.Module) -> list[nn.Module]:
    """The modules of FSDP2 in a module, itself included, outer ones first: each gathers its own parameters to run."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Put parameters that FSDP2 left gathered after a forward pass back into shards, so that they can be written."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_dtypes(model: nn.Module) -> dict[nn.Module, torch.dtype]:
    """The dtype of each module's own parameters in its forward pass, which FSDP2's mixed precision may choose.

    Modules without parameters are left out. Every group of parameters is gathered once, so every rank must call.
    """
    dtypes: dict[nn.Module, torch.dtype] = {}

    def note(modules: Iterable[nn.Module]) -> None:
        dtypes.update((m, p.dtype) for m in modules for p in m.parameters(recurse=False))

    note(model.modules())
    for outer in model.modules():  # outer modules first, so that the innermost has the last word
        if isinstance(outer, FSDPModule):
            outer.unshard()
            note(outer.modules())
            outer.reshard()
    return dtypes


@contextmanager
def gathered_around(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """While the block runs, `module` can be called by itself; afterwards its parameters are shards and can be written.

    A module that FSDP2 shards gathers its own parameters; one that is sharded as a part of another does not, so
    that other is gathered for it.
    """
    around: list[FSDPModule] = []
    if not isinstance(module, FSDPModule):
        around = [m for m in model.modules() if isinstance(m, FSDPModule) and any(c is module for c in m.modules())]
    for outer in around:
        outer.unshard()
    try:
        yield
    finally:
        for outer in around:
            outer.reshard()
        reshard(module)


def runs_alone(part: nn.Module, whole: nn.Module) -> bool:
    """Whether a part can be called without the module around it, whose FSDP2 gathers what the part does not itself."""
    return isinstance(part, FSDPModule) or not isinstance(whole, FSDPModule)


def as_shard_of(parameter: Tensor, part: Tensor) -> Tensor:
    """A DTensor laid out as `parameter` is, from this rank's part of it; a plain `parameter` leaves the part plain."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def ones_for_shard(parameter: nn.Parameter) -> nn.Parameter:
    """Return a whole parameter of ones in the place of a shard, which mixes with nothing plain; any other as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(torch.ones(parameter.shape, dtype=parameter.dtype, device=parameter.device))


def laid_out_like(parameter: Tensor, mask: Tensor) -> Tensor:
    """Gather a sharded mask of a parameter that is whole; any other mask as it is."""
    if is_sharded(mask) and not is_sharded(parameter):
        return cast(Tensor, gather_whole(mask.to(torch.uint8)).bool())
    return mask


def take_shard(parameter: Tensor, whole: Tensor) -> Tensor:
    """The part of `whole`, of the parameter's full shape, that this rank's shard of the parameter covers."""
    for dim, (start, stop) in enumerate(shard_bounds(parameter)):
        whole = whole.narrow(dim, start, stop - start)
    return whole


def shard_dim(placement: Placement) -> int | None:
    """The tensor dimension that a placement cuts, or None if it copies.

    Raises:
        ValueError: a placement that holds sums to be reduced.
    """
    if isinstance(placement, Replicate):
        return None
    dim = getattr(placement, "dim", None)  # Shard, and the strided one of FSDP2 over tensor parallelism
    if dim is None:
        raise ValueError(f"a parameter with placement {placement!r} cannot be pruned; use Shard or Replicate")
    return int(dim)


def chunk(start: int, stop: int, parts: int, index: int) -> tuple[int, int]:
    """The index-th of `parts` pieces of a range, cut as ``torch.chunk`` does: the last ones may be short or empty."""
    each = -(-(stop - start) // parts)
    return min(start + index * each, stop), min(start + (index + 1) * each, stop)


def _bounds(shape: Sequence[int], mesh: DeviceMesh | None, cuts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and stop in each dimension after cutting, in order, by pairs of mesh and tensor dimension."""
    bounds = [(0, size) for size in shape]
    for mesh_dim, dim in cuts:
        assert mesh is not None
        bounds[dim] = chunk(*bounds[dim], mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
    return bounds


def _cuts(parameter: DTensor) -> list[tuple[int, int]]:
    """Pairs of mesh and tensor dimension, in the order in which the parameter was cut."""
    found = [
        (mesh_dim, dim, getattr(placement, "split_factor", 1) > 1)
        for mesh_dim, placement in enumerate(parameter.placements)
        if (dim := shard_dim(placement)) is not None and parameter.device_mesh.size(mesh_dim) > 1
    ]
    # FSDP2 cuts what tensor parallelism left, though its mesh dimension comes first. It says into how many parts
    # tensor parallelism had split (`split_factor`) in a placement that has no public name.
    return [(m, dim) for m, dim, _ in sorted(found, key=lambda cut: cut[2])]


def shard_bounds(parameter: Tensor) -> list[tuple[int, int]]:
    """Start and stop of this rank's part in each dimension of a parameter: all of it, if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return _bounds(parameter.shape, None, ())
    return _bounds(parameter.shape, parameter.device_mesh, _cuts(parameter))


def cut_once(parameters: Mapping[str, Tensor]) -> tuple[dist.ProcessGroup, str] | None:
    """Return the processes that parameters are sharded over and the type of their devices; None if all are whole.

    Raises:
        ValueError: parameters that are cut more than once (tensor parallelism), over different processes, or only some
            of them.
    """
    found: dict[frozenset[int], tuple[dist.ProcessGroup, str]] = {}
    whole = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
    for name, p in parameters.items():
        if not isinstance(p, DTensor):
            continue
        cut = [mesh_dim for mesh_dim, placement in enumerate(p.placements) if shard_dim(placement) is not None]
        if len(cut) != 1:
            raise ValueError(
                f"{name!r} is laid out as {p.placements} over {p.device_mesh.ndim} mesh dimensions; units are found in "
                "parameters that one dimension cuts (FSDP2 without tensor parallelism)"
            )
        group = p.device_mesh.get_group(cut[0])
        ranks = frozenset(dist.get_process_group_ranks(group))
        found.setdefault(ranks, (group, p.device_mesh.device_type))
        if whole or len(found) > 1:
            raise ValueError(
                f"{name!r} is sharded over the processes {sorted(ranks)}, and {(whole or list(parameters))[0]!r} is "
                "not: call fully_shard on the whole model, with one device mesh"
            )
    return next(iter(found.values()), None)


@dataclass(frozen=True)
class Layout:
    """Where the matrix ``(O, I)`` of a parameter lives: over ranks if it is a DTensor, else all of it is here.

    Attributes:
        parameter: The parameter.
        transposed: The parameter stores ``(I, O)`` (transformers' Conv1D).
    """

    parameter: Tensor
    transposed: bool

    @property
    def mesh(self) -> DeviceMesh | None:
        """The devices that the parameter is laid out over; None if all of it is here."""
        return self.parameter.device_mesh if isinstance(self.parameter, DTensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the whole matrix."""
        size = self.parameter.shape
        return (size[1], size[0]) if self.transposed else (size[0], size[1:].numel())

    @property
    def _matrix_cuts(self) -> list[tuple[int, int]]:
        """Pairs of mesh and matrix dimension."""
        cuts = _cuts(self.parameter) if isinstance(self.parameter, DTensor) else []
        if self.parameter.dim() > 2 and any(dim for _, dim in cuts):
            raise ValueError("a convolution cut along anything but its output channels cannot be pruned")
        return [(mesh_dim, 1 - dim if self.transposed else dim) for mesh_dim, dim in cuts]

    @property
    def bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Start and stop of this rank's rows and columns."""
        return self._bounds(self._matrix_cuts)

    def _bounds(self, cuts: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, columns = _bounds(self.shape, self.mesh, cuts)
        return rows, columns

    @property
    def counted(self) -> bool:
        """Whether this rank speaks for its part: true on one of the ranks that hold copies of it."""
        if not isinstance(self.parameter, DTensor):
            return not dist.is_initialized() or dist.get_rank() == 0
        copies = [m for m, p in enumerate(self.parameter.placements) if shard_dim(p) is None]
        return all(self.parameter.device_mesh.get_local_rank(m) == 0 for m in copies)

    def if_spread(self, given: _T | None) -> _T | None:
        """Return what is given if the matrix is spread over ranks; None if all of it is here."""
        return None if self.mesh is None else given

    # -- what tensor parallelism leaves to the layer's forward, before FSDP2 cuts it -------------------------------

    def forward_bounds(self, data_ranks: frozenset[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the part that this rank's forward pass multiplies with."""
        return self._bounds(self._tensor_cuts(data_ranks))

    def _tensor_cuts(self, data_ranks: frozenset[int]) -> list[tuple[int, int]]:
        return [cut for cut in self._matrix_cuts if not self._over_data(cut[0], data_ranks)]

    def _over_data(self, mesh_dim: int, data_ranks: frozenset[int]) -> bool:
        ranks = dist.get_process_group_ranks(self._group(mesh_dim))
        return data_ranks.issuperset(ranks)

    def sum_to_shard(self, part: Tensor, group: dist.ProcessGroup | None, data_ranks: frozenset[int]) -> Tensor:
        """Sum the forward's part of a matrix over the data-parallel ranks, and return this rank's own part of it.

        Args:
            part: ``[o, i]``, rows and columns of `forward_bounds`, this rank's samples.
            group: The data-parallel group.
            data_ranks: Its global ranks.
        """
        (row, row_end), (column, column_end) = self.bounds
        (row_0, _), (column_0, _) = self.forward_bounds(data_ranks)
        cuts = [cut for cut in self._matrix_cuts if self._over_data(cut[0], data_ranks)]
        if len(cuts) == 1 and dist.get_world_size(self._group(cuts[0][0])) == len(data_ranks):
            moved = part.movedim(cuts[0][1], 0)
            return reduce_scatter(moved, self._group(cuts[0][0])).movedim(0, cuts[0][1])
        dist.all_reduce(part, group=group)
        return part[row - row_0 : row_end - row_0, column - column_0 : column_end - column_0].clone()

    def whole_vector(self, part: Tensor, dim: int, data_ranks: frozenset[int]) -> Tensor:
        """A vector over all rows (dim 0) or columns (1) from the forward's part of it."""
        cuts = [cut for cut in self._tensor_cuts(data_ranks) if cut[1] == dim]
        if not cuts or part.numel() == self.shape[dim]:
            return part
        if len(cuts) > 1:
            raise ValueError("a weight cut twice along one dimension by tensor parallelism cannot be pruned")
        return all_gather(part, self.shape[dim], self._group(cuts[0][0]))

    def _group(self, mesh_dim: int) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(mesh_dim)

    # -- whole rows ----------------------------------------------------------------------------------------------

    @property
    def _column_cut(self) -> int | None:
        """The mesh dimension that cuts rows into pieces."""
        cuts = [mesh_dim for mesh_dim, dim in self._matrix_cuts if dim == 1]
        if len(cuts) > 1:
            raise ValueError("a weight whose inputs are cut by two mesh dimensions cannot be pruned")
        return cuts[0] if cuts else None

    @property
    def row_bounds(self) -> tuple[int, int]:
        """Start and stop of the rows that this rank has after `to_rows`."""
        rows = self.bounds[0]
        if self._column_cut is None or self.mesh is None:
            return rows
        return chunk(*rows, self.mesh.size(self._column_cut), self.mesh.get_local_rank(self._column_cut))

    def to_rows(self, part: Tensor) -> Tensor:
        """This rank's part ``[o, i]`` of a matrix to whole rows of it, ``[r, I]``: pieces change ranks if need be."""
        if self._column_cut is None:
            return part
        return self._exchanged(part, Shard(1), Shard(0))

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `to_rows`."""
        if self._column_cut is None:
            return rows
        return self._exchanged(rows, Shard(0), Shard(1))

    def _exchanged(self, part: Tensor, source: Shard, target: Shard) -> Tensor:
        mesh = self.mesh
        assert mesh is not None
        assert self._column_cut is not None
        if part.dtype == torch.bool:
            return self._exchanged(part.to(torch.uint8), source, target).bool()
        names = mesh.mesh_dim_names
        line = mesh if mesh.ndim == 1 else mesh[names[self._column_cut]] if names else None
        if line is None:
            raise ValueError("a device mesh of several dimensions needs names for them (mesh_dim_names)")
        (row, row_end), _ = self.bounds
        shape = torch.Size((row_end - row, self.shape[1]))
        spread = DTensor.from_local(
            part.contiguous(), line, [source], run_check=False, shape=shape, stride=(shape[1], 1)
        )
        return local(spread.redistribute(placements=[target])).contiguous()


class SliceLayout(Layout):
    """Where one matrix ``(O, I)`` lives that is a part of its parameter."""

    @property
    def _parameter_cuts(self) -> list[tuple[int, int]]:
        """Pairs of mesh dimension and dimension of the parameter."""
        return _cuts(self.parameter) if isinstance(self.parameter, DTensor) else []

    def forward_bounds(self, data_ranks: frozenset[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the part that this rank's forward pass multiplies with.

        Raises:
            ValueError: ranks that see the same samples hold other parts.
        """
        if not all(self._over_data(mesh_dim, data_ranks) for mesh_dim, _ in self._parameter_cuts):
            raise ValueError(
                "experts or attention projections that are spread over ranks which see the same samples (expert or "
                "tensor parallelism) cannot be calibrated on; shard them with fully_shard alone, or use a score "
                "without data (magnitude)"
            )
        return super().forward_bounds(data_ranks)

    def gather(self, part: Tensor) -> Tensor:
        """The whole matrix on every rank, from this rank's part of it, ``[o, i]``."""
        if self.mesh is None:
            return part
        (row, row_end), (column, column_end) = self.bounds
        wide = part.to(torch.uint8) if part.dtype == torch.bool else part
        whole = wide.new_zeros(self.shape)
        if self.counted:
            whole[row:row_end, column:column_end] = wide
        for mesh_dim in range(self.mesh.ndim):
            dist.all_reduce(whole, group=self._group(mesh_dim))
        return whole.to(part.dtype)


@dataclass(frozen=True)
class StackLayout(SliceLayout):
    """Where one matrix of a stack ``(E, O, I)`` lives; `transposed`: of a stack ``(E, I, O)``.

    Attributes:
        index: Which of the E.
    """

    index: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the matrix."""
        _, first, second = self.parameter.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def place(self) -> int | None:
        """Where this rank's part of the stack has the matrix, or a part of it; None if it does not."""
        start, stop = shard_bounds(self.parameter)[0]
        return self.index - start if start <= self.index < stop else None

    @property
    def _matrix_cuts(self) -> list[tuple[int, int]]:
        return [(mesh_dim, 2 - dim if self.transposed else dim - 1) for mesh_dim, dim in self._parameter_cuts if dim]

    @property
    def bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Start and stop of this rank's rows and columns; no row where it has nothing of the matrix."""
        rows, columns = self._bounds(self._matrix_cuts)
        return rows if self.place is not None else (0, 0), columns


@dataclass(frozen=True)
class RowsLayout(SliceLayout):
    """Where some rows of a matrix live, as a matrix of their own.

    Attributes:
        first: The first of the rows.
        last: The one behind them.
    """

    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the rows."""
        return self.last - self.first, self.parameter.shape[1]

    @property
    def places(self) -> tuple[int, int]:
        """Start and stop of what is here of the rows, in this rank's part of the parameter."""
        start, stop = shard_bounds(self.parameter)[0]
        first, last = (min(max(row, start), stop) - start for row in (self.first, self.last))
        return first, last

    @property
    def _matrix_cuts(self) -> list[tuple[int, int]]:
        return [(mesh_dim, dim) for mesh_dim, dim in self._parameter_cuts if dim]

    @property
    def bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Start and stop of this rank's rows, counted from the first, and columns."""
        start, (first, last) = shard_bounds(self.parameter)[0][0] - self.first, self.places
        rows = (first + start, last + start) if first < last else (0, 0)
        return rows, self._bounds(self._matrix_cuts)[1]


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over a group, cut along the first dimension as ``torch.chunk`` does; each rank gets its piece."""
    parts, size = dist.get_world_size(group), tensor.shape[0]
    each = -(-size // parts)
    if each * parts != size:
        padding = tensor.new_zeros(each * parts - size, *tensor.shape[1:])
        tensor = torch.cat([tensor, padding])
    own = tensor.new_empty(each, *tensor.shape[1:])
    _reduce_scatter(own, tensor.contiguous(), group=group)
    start, stop = chunk(0, size, parts, dist.get_rank(group))
    return own[: stop - start]


def all_gather(part: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of a tensor cut along its first dimension, of length `size`, as `reduce_scatter` cuts it."""
    parts = dist.get_world_size(group)
    each = -(-size // parts)
    padded = part.new_zeros(each, *part.shape[1:])
    padded[: part.shape[0]] = part
    whole = part.new_empty(each * parts, *part.shape[1:])
    _all_gather(whole, padded, group=group)
    return whole[:size]


def counts_over_ranks(tensors: Mapping[str, Tensor], count: Callable[[Tensor], int]) -> dict[str, int]:
    """`count` of each tensor; of those that are shards, summed over all ranks, every part once, in one collective."""
    counts: dict[str, int] = {}
    shards: list[str] = []
    for name, tensor in tensors.items():  # once: masks are unpacked for it
        counts[name] = count(local(tensor)) if not is_sharded(tensor) or Layout(tensor, False).counted else 0
        if isinstance(tensor, DTensor):
            shards.append(name)
            device = tensor.device_mesh.device_type
    if shards:
        totals = torch.tensor([counts[name] for name in shards], dtype=torch.int64, device=device)
        dist.all_reduce(totals)
        counts |= dict(zip(shards, totals.tolist(), strict=True))
    return counts


def count_over_ranks(masks: Mapping[str, Tensor], count: Callable[[Tensor], int]) -> int:
    """Sum of `count` over all masks; of those that are shards, over all ranks, every part once."""
    return sum(counts_over_ranks(masks, count).values())


def at_rest(tensor: Tensor) -> Tensor:
    """A tensor in main memory; a shard stays on the devices of its mesh."""
    return tensor if isinstance(tensor, DTensor) else tensor.cpu()


def gather_whole(tensor: Any) -> Any:
    """The whole of a DTensor on every rank; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
