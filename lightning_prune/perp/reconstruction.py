"""`reconstruct`: fit every decoder block of a pruned model to what the dense block computes, block after block.

PERP, layer-wise reconstruction: Zimmer et al. 2023, arXiv 2312.15230. No loss and no backward pass through the whole
model: one block, its two versions and its activations are all that is worked on at a time.

Letters: B samples, T tokens, D hidden channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError
from lightning_prune.naming import clean_name
from lightning_prune.perp.adapters import adapted_modules, attach, check_plain_model, merge, remove_adapters
from lightning_prune.perp.layers import sparse_layers
from lightning_prune.perp.masks import checked_mask
from lightning_prune.perp.options import check_adapter, check_options, check_parts, select_parameters
from lightning_prune.perp.record import find_retraining
from lightning_prune.progress import Advance, progress_bar
from lightning_prune.pruning.blocks import BlockWalk, Samples, walk_stacks
from lightning_prune.pruning.masks import check_masks, named_weights
from lightning_prune.pruning.running import ForwardContext, forward, on_device, quiet_model
from lightning_prune.pruning.targets import find_stacks
from lightning_prune.ranks import Ranks
from lightning_prune.safety import Originals, restored_on_failure, uninterrupted
from lightning_prune.schedules import learning_rate_factor

TARGETS = ("dense", "pruned")
# Of adapters in single blocks: names of whole models do not match there, and dropout is off.
_REFUSED = ("rank_pattern", "alpha_pattern", "lora_dropout")
# Options that have chosen the modules when the blocks are reached.
_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class BlockError:
    """How far a block's outputs are from the dense ones: squared differences over squared dense outputs.

    Attributes:
        name: Of the block, such as ``model.layers.0``.
        before: Before it was fitted, on the outputs of the blocks before it, which are fitted already.
        after: After it was fitted and merged.
        changed: False where the block has nothing pruned, or where fitting did not lower its error: then its weights
            are as they were.
    """

    name: str
    before: float
    after: float
    changed: bool


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` did.

    Attributes:
        blocks: One entry a block, in the order they run; stacks without anything to fit are left out.
    """

    blocks: tuple[BlockError, ...]

    @property
    def before(self) -> float:
        """Mean error of the blocks before each was fitted."""
        return sum(block.before for block in self.blocks) / len(self.blocks)

    @property
    def after(self) -> float:
        """Mean error of the blocks after each was fitted."""
        return sum(block.after for block in self.blocks) / len(self.blocks)


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    dense: DenseSource,
    masks: Mapping[str, Tensor] | None = None,
    adapter: str | None = "mask_lora",
    train: Iterable[str] = ("bias", "norm"),
    steps: int = 100,
    learning_rate: float = 1e-3,
    num_samples: int = 128,
    targets: str = "dense",
    offload: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    forward_context: ForwardContext = contextlib.nullcontext,
    ranks: Ranks | None = None,
    **lora_options: Any,
) -> Reconstruction:
    """Fit each decoder block of a pruned model to the dense block's outputs, and merge; every zero stays.

    A block gets the adapters of `add_adapters`, is trained by AdamW (no weight decay; linear schedule, 10 % warm-up)
    on the mean squared error of its outputs over real tokens, and is merged before the next one begins. Its inputs
    are the outputs of the fitted blocks before it, so it also makes up for what they could not. Works on masks of any
    score. If anything fails or is interrupted, every weight is bit-identical to before.

    On the model's device are at a time: one block with adapters, its dense weights, and one batch's activations
    besides the hidden states of all samples, twice (inputs and targets, ``[B, T, D]`` each), which `offload` moves to
    main memory. Main memory also keeps a copy of every weight that changes until all are done.

    Args:
        model: A transformers model with pruned weights, changed in place.
        batches: Calibration data as in `lightning_prune.prune`. One batch is one step, so their size matters.
        dense: What the model was before it was pruned: a second model, its weights by parameter name (those that are
            not pruned may be missing), or what `lightning_prune.open_checkpoint` has opened (a transformers folder,
            a safetensors file, a checkpoint), read block by block.
        masks: Bool masks by parameter name, True = kept; a weight without one takes its exact zeros.
        adapter: ``"mask_lora"``, ``"scale_lora"``, ``"lora_prune"``, or None to train `train` alone.
        train: Any of ``"bias"`` and ``"norm"``, of the blocks.
        steps: Optimizer steps for each block, passing over the batches in a new order each time.
        learning_rate: Peak learning rate.
        num_samples: Calibration samples.
        targets: What the dense block is given to compute the targets from. ``"dense"``: what it is given in the dense
            model, so that a block also undoes errors of those before it. ``"pruned"``: what the pruned block is given,
            so that each block stands for itself. Of several stacks (encoder and decoder) each begins with what the
            fitted stacks before it give it, in both cases.
        offload: Device where hidden states wait, such as ``"cpu"``; default the model's.
        seed: Of the adapters' initial values and the order of batches; the global random state is left alone.
        progress: Show a progress bar in a terminal.
        forward_context: Makes the context that forward passes run in (autocast).
        ranks: The processes that work together, each with batches and `num_samples` of its own and all with the same
            weights: gradients are averaged over them, and all end with the same weights. Every one must call.
        **lora_options: As of `add_adapters`, without ``rank_pattern``, ``alpha_pattern`` and ``lora_dropout``.

    Returns:
        The error of each block before and after.

    Raises:
        TypeError, ValueError: an argument that does not fit; see `add_adapters`. `dense` is pruned itself or of another
            model.
        CalibrationError: no sample; NaN or infinity; the model does not run its blocks one after the other.

    Example::

        dense = AutoModelForCausalLM.from_pretrained("model")
        prune(model, batches, score="wanda", pattern="2:4")
        reconstruct(model, batches, dense)
    """
    check_adapter(adapter)
    check_options(adapter, lora_options)
    parts = check_parts(train)
    check_settings(adapter, parts, steps, learning_rate, targets, lora_options)
    check_plain_model(model)
    masks = dict(masks or {})
    check_masks(model, masks)
    blocks = [block for stack in find_stacks(model) for block in stack]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} names no decoder blocks (_no_split_modules), so there is nothing to go through "
            "block by block; train the whole model with add_adapters"
        )
    names = adapted_modules(model, adapter or "mask_lora", lora_options, masks)
    adapters = _Adapters(adapter, parts, lora_options, masks, _by_block(names, blocks))
    if not any(adapters.fits(name, block) for name, block in blocks):
        raise ValueError(
            f"adapter={adapter!r} with train={parts} leaves nothing to fit in the decoder blocks of "
            f"{type(model).__name__}: no block has both pruned weights and something to train"
        )
    _check_own(model, blocks, parts)
    source = DenseBlocks(dense, model, blocks, [f"{name}.weight" for name in names])
    _check_weights(model, source, adapters)

    with quiet_model(model, freeze=False), restored_on_failure() as originals:
        torch.manual_seed(seed)
        device = None if offload is None else torch.device(offload)
        stacks = [stack for stack in find_stacks(model) if any(adapters.fits(name, block) for name, block in stack)]
        places = {name: place for place, (name, _) in enumerate(blocks)}
        moved = on_device(model, batches)
        samples = Samples(model, moved, num_samples, _run_body, forward_context, offload=device)
        walks = walk_stacks(samples, [[block for _, block in stack] for stack in stacks], errors=ranks)
        errors = []
        with progress_bar("Reconstructing blocks", sum(map(len, stacks)) * steps, progress) as advance:
            for position, walk in walks:
                fitter = BlockFitter(walk, steps, learning_rate, seed, ranks)
                given = [batch.hidden for batch in walk.batches]  # to the dense blocks
                for index, (name, block) in enumerate(stacks[position]):
                    wanted = _dense_outputs(walk, index, source.weights(places[name]), given)
                    if adapters.fits(name, block):
                        errors.append(_fitted(fitter, index, name, wanted, adapters, originals, advance))
                    else:
                        energy = fitter.energy(wanted)
                        error = _share(fitter.error(index, wanted), energy)
                        errors.append(BlockError(name, error, error, False))
                        advance(steps)
                    for _ in walk.run(index, keep_output=True):
                        pass
                    given = wanted if targets == "dense" else [batch.hidden for batch in walk.batches]
    return Reconstruction(tuple(errors))


def _run_body(model: nn.Module, batch: Any) -> None:
    forward(model, batch, ())


@torch.no_grad()
def _dense_outputs(walk: BlockWalk, index: int, weights: Mapping[str, Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """What the dense block makes of its inputs, ``[B, T, D]`` for each batch."""
    pairs = zip(walk.batches, given, strict=True)
    return [walk.put_by(walk.forward(index, batch, hidden, weights)) for batch, hidden in pairs]


def _fitted(
    fitter: BlockFitter,
    index: int,
    name: str,
    wanted: Sequence[Tensor],
    adapters: _Adapters,
    originals: Originals,
    advance: Advance,
) -> BlockError:
    """Fit one block and merge, or leave it as it was where that did not lower its error."""
    block, energy = fitter.walk.blocks[index], fitter.energy(wanted)
    before = _share(fitter.error(index, wanted), energy)
    _check_finite(name, before, "before it was fitted: the model or the calibration data is broken")
    try:
        changing = adapters.put_on(name, block)
        for parameter in changing:
            originals.keep(parameter)
        fitter.train(index, wanted, energy, advance)
        merge(block)
    except BaseException:
        with uninterrupted():
            if find_retraining(block) is not None:
                remove_adapters(block)
        raise
    after = _share(fitter.error(index, wanted), energy)
    _check_finite(name, after, f"after it was fitted: use a learning_rate below {fitter.learning_rate}")
    if after < before:
        return BlockError(name, before, after, True)
    originals.restore(changing)
    return BlockError(name, before, before, False)


def _share(error: float, energy: float) -> float:
    return error / energy if energy else error


def _check_finite(name: str, error: float, when: str) -> None:
    if not math.isfinite(error):
        raise CalibrationError(f"the error of {name!r} is not finite {when}. The weights are unchanged")


# -- the adapters of single blocks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapters:
    """What a block is fitted with.

    Attributes:
        adapter: The variant, or None.
        parts: Own parameters that are trained.
        options: LoRA options as given for the whole model.
        masks: By parameter name.
        modules: Names of the pruned modules to adapt, in their block, by the block's name.
    """

    adapter: str | None
    parts: tuple[str, ...]
    options: Mapping[str, Any]
    masks: Mapping[str, Tensor]
    modules: Mapping[str, list[str]]

    def fits(self, name: str, block: nn.Module) -> bool:
        """Whether a block has pruned weights, and something to train beside them."""
        return bool(self.modules[name]) and (self.adapter is not None or bool(select_parameters(block, self.parts)))

    def put_on(self, name: str, block: nn.Module) -> list[nn.Parameter]:
        """Put adapters on a block; returns the parameters that training and merging will change."""
        chosen = {"target_modules": self.modules[name]} if self.adapter is not None else {}
        options = {k: v for k, v in self.options.items() if k not in _SELECTING} | chosen
        attach(block, self.adapter, self.masks_of(name), self.parts, options)
        trained = list(select_parameters(block, self.parts).values())
        return [*trained, *(layer.base_weight for _, layer in sparse_layers(block))]

    def masks_of(self, name: str) -> dict[str, Tensor]:
        """The masks of one block, by names in it."""
        return {n.removeprefix(f"{name}."): m for n, m in self.masks.items() if n.startswith(f"{name}.")}


def _by_block(names: Sequence[str], blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, list[str]]:
    return {block: [n.removeprefix(f"{block}.") for n in names if n.startswith(f"{block}.")] for block, _ in blocks}


def _check_own(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], parts: Sequence[str]) -> None:
    """Refuse what two blocks share: fitted in the second, it would change the first, which is done."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for block, module in blocks:
        for name, parameter in select_parameters(module, parts).items():
            shared = users[id(parameter)]
            if not all(user.startswith(f"{block}.") for user in shared):
                raise ValueError(
                    f"{name!r} of the block {block!r} is one parameter with others ({', '.join(shared)}), so that "
                    f"fitting it there would change them too: leave its part out of train={tuple(parts)}, or untie them"
                )


def _check_weights(model: nn.Module, source: DenseBlocks, adapters: _Adapters) -> None:
    """Masks must hold, and the first pruned weight must have been there before."""
    weights = named_weights(model)
    for name in (f"{block}.{module}.weight" for block, modules in adapters.modules.items() for module in modules):
        if name in adapters.masks:
            checked_mask(name, adapters.masks[name], weights[name].detach())
    for index, (block, modules) in enumerate(adapters.modules.items()):
        for module in modules:
            name = f"{block}.{module}.weight"
            mask = adapters.masks.get(name)
            pruned = weights[name].detach() == 0 if mask is None else ~mask.to(weights[name].device)
            if bool(pruned.any()):
                check_is_dense(name, source.weights(index)[f"{module}.weight"], pruned)
                return


def check_settings(
    adapter: str | None,
    parts: Sequence[str],
    steps: int,
    learning_rate: float,
    targets: str,
    options: Mapping[str, Any],
) -> None:
    """Refuse what no model could take.

    Raises:
        ValueError: naming the argument.
    """
    if adapter == "lora":
        raise ValueError(
            "adapter='lora' cannot be merged, since its product is dense, and each block is merged before the next "
            "begins; use adapter='mask_lora'"
        )
    outside = [part for part in parts if part not in ("bias", "norm")]
    if outside:
        raise ValueError(f"train={tuple(parts)!r}: {outside[0]!r} is in no decoder block; use 'bias' and 'norm'")
    for name in _REFUSED:
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} is not supported block by block; leave it out")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer >= 1, such as 100")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate!r} must be above 0, such as 1e-3")
    if targets not in TARGETS:
        raise ValueError(f"targets={targets!r} must be one of {TARGETS}")


# arXiv 2312.15230, section 4: AdamW without weight decay, a linear schedule with 10 % warm-up.
_WARMUP = 0.1


def squared_sum(values: Tensor, keep: Tensor | None) -> Tensor:
    """Sum of squares over real tokens, in float32 at least.

    Args:
        values: ``[B, T, D]``.
        keep: ``[B, T]`` bool, True where a token is real, or None.
    """
    # Chosen, not multiplied with 0: what a block makes of padding may be NaN.
    values = values if keep is None else values[keep]
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().sum()


def squared_error(output: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
    """Sum of squared differences over real tokens, taken in float32 at least; arguments as `squared_sum`."""
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return squared_sum(output.to(wide) - target.to(output.device, wide), keep)


@dataclass(frozen=True)
class BlockFitter:
    """Fits the blocks of a walk, each on the hidden states that the walk has reached.

    Attributes:
        walk: Inputs of the block that is next, and what else it receives.
        steps: Optimizer steps for a block.
        learning_rate: Peak learning rate.
        seed: Of the order of batches.
        ranks: The processes whose gradients and errors are added up, or None.
    """

    walk: BlockWalk
    steps: int
    learning_rate: float
    seed: int
    ranks: Ranks | None

    @torch.no_grad()
    def energy(self, targets: Sequence[Tensor]) -> float:
        """Squares of the targets of every batch, ``[B, T, D]`` each, summed over real tokens and ranks."""
        pairs = zip(self.walk.batches, targets, strict=True)
        return self._over_ranks(sum(float(squared_sum(t.to(b.device), b.keep)) for b, t in pairs))

    @torch.no_grad()
    def error(self, index: int, targets: Sequence[Tensor]) -> float:
        """Squared differences between the block's outputs and the targets, summed over real tokens and ranks."""
        total = 0.0
        for batch, target in zip(self.walk.batches, targets, strict=True):
            output = self.walk.forward(index, batch, batch.hidden)
            total += float(squared_error(output, target, batch.keep))
        return self._over_ranks(total)

    @torch.enable_grad()
    def train(self, index: int, targets: Sequence[Tensor], energy: float, advance: Advance) -> None:
        """Train what requires a gradient in the block on the squared error; ``.grad`` are as before afterwards.

        Args:
            index: The block.
            targets: ``[B, T, D]`` for each batch.
            energy: Of the targets: the loss is a share of it, so that learning rates mean the same in every block.
            advance: Told of each step.
        """
        parameters = [p for p in self.walk.blocks[index].parameters() if p.requires_grad]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        warmup = round(_WARMUP * self.steps)
        factor = partial(learning_rate_factor, steps=self.steps, warmup_steps=warmup, schedule="linear")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scale = 1.0 / max(energy / self._tokens(), torch.finfo(torch.float32).tiny)
        for _, position in zip(range(self.steps), self._order(), strict=False):
            batch = self.walk.batches[position]
            output = self.walk.forward(index, batch, batch.hidden)
            error = squared_error(output, targets[position], batch.keep)
            tokens = output[..., 0].numel() if batch.keep is None else int(batch.keep.sum())
            (error * (scale / max(tokens, 1))).backward()  # type: ignore[no-untyped-call]
            self._average(parameters)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def _tokens(self) -> float:
        """Real tokens of all batches and ranks."""
        shapes = ((b.hidden.shape[:2].numel(), b.keep) for b in self.walk.batches)
        return self._over_ranks(float(sum(every if keep is None else int(keep.sum()) for every, keep in shapes)))

    def _order(self) -> Iterator[int]:
        """Positions of batches without end, each pass in a new order."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.walk.batches), generator=generator).tolist()

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.ranks is None:
            return
        count = len(self.ranks.data_ranks())
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = self.ranks.sum_samples(parameter.grad) / count

    def _over_ranks(self, value: float) -> float:
        if self.ranks is None:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.ranks.device)
        return float(self.ranks.sum_samples(total))


class StoredWeights(Protocol):
    """Weights in a file, such as `lightning_prune.open_checkpoint` opens."""

    def names(self) -> list[str]:
        """Names of all weights."""

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of them."""


DenseSource = nn.Module | Mapping[str, Tensor] | StoredWeights


class DenseBlocks:
    """Dense weights of decoder blocks, loaded when asked for.

    Args:
        dense: The dense model; its weights by parameter name, of which those that are not pruned may be missing; or
            an opened checkpoint of it, read block by block.
        model: The pruned model.
        blocks: Clean names and modules of its decoder blocks.
        pruned: Names of its parameters that are pruned.

    Raises:
        TypeError: `dense` is none of these.
        ValueError: a weight is missing.
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        dense: DenseSource,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        pruned: Collection[str],
    ) -> None:
        self._blocks = blocks
        names, self._load = _opened(dense, model)
        self._sources: dict[str, str] = {}
        for block, module in blocks:
            for name in named_weights(module):
                whole = f"{block}.{name}"
                source = _find(whole, names, getattr(model, "base_model_prefix", ""))
                if source is not None:
                    self._sources[whole] = source
                elif whole in pruned or not isinstance(dense, Mapping):
                    raise ValueError(
                        f"dense has no {whole!r}, which the pruned model has: give the model that was pruned, as it "
                        "was before"
                    )

    def weights(self, index: int) -> dict[str, Tensor]:
        """Weights of one block by their names in it, of its own dtype and device.

        Raises:
            ValueError: a weight has another shape than the pruned model's.
        """
        block, module = self._blocks[index]
        wanted = {self._sources.get(f"{block}.{clean_name(name)}"): (name, p) for name, p in module.named_parameters()}
        found = {}
        for source, tensor in self._load([name for name in wanted if name is not None]).items():
            name, own = wanted[source]
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{source!r} of dense has shape {tuple(tensor.shape)}, but {tuple(own.shape)} in the pruned model: "
                    "give the model that was pruned, as it was before"
                )
            found[name] = tensor.detach().to(own.device, own.dtype)
        return found


def _opened(
    dense: DenseSource, model: nn.Module
) -> tuple[Collection[str], Callable[[Collection[str]], Mapping[str, Tensor]]]:
    """The names of all weights, and a function that loads some of them."""
    if isinstance(dense, nn.Module):
        if dense is model:
            raise ValueError("dense is the pruned model itself; give a copy of the model from before it was pruned")
        weights: Mapping[str, Tensor] = named_weights(dense)
    elif isinstance(dense, Mapping):
        weights = dense
    elif hasattr(dense, "names") and hasattr(dense, "load"):
        return set(dense.names()), dense.load
    else:
        raise TypeError(
            f"dense={type(dense).__name__} must be the dense model, its weights by name, or a checkpoint that "
            "lightning_prune.open_checkpoint(path) has opened"
        )
    return set(weights), lambda names: {name: weights[name] for name in names}


def _find(name: str, names: Collection[str], prefix: str) -> str | None:
    """What a parameter is called in a source: as in the model, in a LightningModule, or without the family's prefix."""
    candidates = (name, f"model.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in names), None)


@torch.no_grad()
def check_is_dense(name: str, dense: Tensor, pruned: Tensor) -> None:
    """Refuse dense weights with zeros where those of the pruned model are.

    Raises:
        ValueError: nothing was there before, so there is nothing to fit to.
    """
    if not bool(dense[pruned].any()):
        raise ValueError(
            f"all {int(pruned.sum())} pruned weights of {name!r} are zero in dense too: it is pruned itself; give the "
            "model from before it was pruned"
        )
