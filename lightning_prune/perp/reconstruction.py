"""`reconstruct`: fit every decoder block of a pruned model to what the dense block computes, block after block.

Through adapters: PERP's layer-wise reconstruction, Zimmer et al. 2023, arXiv 2312.15230. All kept weights of half
blocks: "A free lunch", arXiv 2510.14444. No loss and no backward pass through the whole model: one block, its two
versions and its activations are all that is worked on at a time.

Letters: B samples, T tokens, D hidden channels.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError
from lightning_prune.naming import clean_name
from lightning_prune.perp.adapters import adapted_modules, attach, check_plain_model, merge, remove_adapters
from lightning_prune.perp.masks import checked_mask
from lightning_prune.perp.options import OPTIONS, check_adapter, check_options, check_parts, select_parameters
from lightning_prune.perp.record import find_retraining
from lightning_prune.perp.windows import Window, cut
from lightning_prune.progress import progress_bar
from lightning_prune.pruning.batches import batch_size, samples, take
from lightning_prune.pruning.blocks import BlockWalk, Samples, walk_stacks
from lightning_prune.pruning.enforcement import Enforcer
from lightning_prune.pruning.masks import check_masks, named_weights
from lightning_prune.pruning.running import ForwardContext, forward, on_device, quiet_model
from lightning_prune.pruning.targets import find_stacks, find_targets
from lightning_prune.ranks import Ranks
from lightning_prune.safety import Originals, restored_on_failure, uninterrupted
from lightning_prune.schedules import learning_rate_factor

# Of adapters in single blocks: names of whole models do not match there, and dropout is off.
_REFUSED = ("rank_pattern", "alpha_pattern", "lora_dropout")
# Options that have chosen the modules when the blocks are reached.
_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
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
        learning_rate: Peak learning rate.
        num_samples: Calibration samples.
        teacher: What the dense window is given to compute the targets from. ``"dense"``: what it is given in the dense
            model, so that a window also undoes errors of those before it. ``"pruned"``: what the pruned window is
            given, so that each stands for itself. Of several stacks (encoder and decoder) each begins with what the
            fitted stacks before it give it, in both cases.
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
    learning_rate: float = 1e-3
    num_samples: int = 128
    teacher: str = "dense"
    offload: torch.device | str | None = None
    lora_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any], argument: str = "reconstruct") -> ReconstructSettings:
        """Complete and check options by name, where those of LoRA stand beside the others.

        With ``train="all"`` the defaults are half blocks, and one pass with 2 samples a step at a learning rate of
        3e-4.
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
            everything = {"adapter": None, "window": "half", "epochs": 1, "batch_size": 2, "learning_rate": 3e-4}
            given = {**everything, **given}
        if given.get("steps") is not None and "epochs" not in options:
            given["epochs"] = None
        if given.get("epochs") is not None and "steps" not in options:
            given["steps"] = None
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
        for name in _REFUSED:
            if self.lora_options.get(name):
                raise ValueError(f"{name}={self.lora_options[name]!r} is not supported block by block; remove it")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps!r} and epochs={self.epochs!r}: give one of them, such as steps=100")
        for name, least in (("steps", 100), ("epochs", 1), ("batch_size", 2), ("num_samples", 128)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
            if not whole and (value is not None or name == "num_samples"):
                raise ValueError(f"{name}={value!r} must be an integer >= 1, below 2**31, such as {least}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} must be above 0, such as 1e-3")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}")

    def options(self) -> dict[str, Any]:
        """Return what `of` makes these settings from."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lora_options"}
        return {**own, **self.lora_options}

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are trained beside weights or adapters."""
        return ("bias", "norm") if isinstance(self.train, str) else self.train


@dataclass(frozen=True)
class BlockError:
    """How far a window's outputs are from the dense ones: squared differences over squared dense outputs.

    Attributes:
        name: Of the block, such as ``model.layers.0``, and of its half where it has two.
        before: Before it was fitted, on the outputs of the windows before it, which are fitted already.
        after: After it was fitted and merged.
        changed: False where the window has nothing pruned, or where fitting did not lower its error: then its weights
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
        blocks: One entry a window, in the order they run; stacks without anything to fit are left out.
    """

    blocks: tuple[BlockError, ...]

    @property
    def before(self) -> float:
        """Mean error of the windows before each was fitted."""
        return sum(block.before for block in self.blocks) / len(self.blocks)

    @property
    def after(self) -> float:
        """Mean error of the windows after each was fitted."""
        return sum(block.after for block in self.blocks) / len(self.blocks)


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    dense: DenseSource,
    masks: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
    forward_context: ForwardContext = contextlib.nullcontext,
    ranks: Ranks | None = None,
    **options: Any,
) -> Reconstruction:
    """Fit each decoder block of a pruned model, or its halves, to the dense one's outputs; every zero stays.

    A window is trained by AdamW (no weight decay; linear schedule, 10 % warm-up) on the mean squared error of its
    outputs over real tokens, through adapters that are merged before the next one begins, or with all its kept weights
    (``train="all"``). Its inputs are the outputs of the fitted windows before it, so it also makes up for what they
    could not. One that fitting did not improve is put back. Works on masks of any score. If anything fails or is
    interrupted, every weight is bit-identical to before.

    On the model's device are at a time: one window with what is trained (and for ``train="all"`` its gradients and two
    optimizer states), its block's dense weights, and one batch's activations besides the hidden states of all samples,
    three times (inputs of the pruned and of the dense block, and targets, ``[B, T, D]`` each), which `offload` moves
    to main memory. Main memory also keeps a copy of every weight that changes until all are done. Weights narrower
    than float32 are trained as float32 copies, and rounded before each step.

    Args:
        model: A transformers model with pruned weights, changed in place.
        batches: Calibration data as in `lightning_prune.prune`. One batch is one step, so their size matters.
        dense: What the model was before it was pruned: a second model, its weights by parameter name (those that are
            not pruned may be missing), or what `lightning_prune.open_checkpoint` has opened (a transformers folder,
            a safetensors file, a checkpoint), read block by block.
        masks: Bool masks by parameter name, True = kept; a weight without one takes its exact zeros.
        seed: Of the adapters' initial values and the order of batches; the global random state is left alone.
        progress: Show a progress bar in a terminal.
        forward_context: Makes the context that forward passes run in (autocast).
        ranks: The processes that work together, each with batches and `num_samples` of its own and all with the same
            weights: gradients are averaged over them, and all end with the same weights. Every one must call.
        **options: Those of `ReconstructSettings` (``train``, ``adapter``, ``window``, ``steps`` or ``epochs``,
            ``batch_size``, ``learning_rate``, ``num_samples``, ``teacher``, ``offload``), and for adapters those of
            `add_adapters`, without ``rank_pattern``, ``alpha_pattern`` and ``lora_dropout``.

    Returns:
        The error of each window before and after.

    Raises:
        TypeError, ValueError: an argument that does not fit; see `add_adapters`. `dense` is pruned itself or of another
            model.
        CalibrationError: no sample; NaN or infinity; the model does not run its blocks one after the other.

    Example::

        dense = AutoModelForCausalLM.from_pretrained("model")
        prune(model, batches, score="wanda", pattern="2:4")
        reconstruct(model, batches, dense, train="all")
    """
    settings = ReconstructSettings.of(options)
    check_plain_model(model)
    masks = dict(masks or {})
    check_masks(model, masks)
    blocks = [block for stack in find_stacks(model) for block in stack]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} names no decoder blocks (_no_split_modules), so there is nothing to go through "
            "block by block; train the whole model with add_adapters"
        )
    kind = _KeptWeights if settings.train == "all" else _Adapters
    training: _Training = kind(settings, masks, model, blocks)
    if not any(training.fits(name, block) for name, block in blocks):
        raise ValueError(
            f"adapter={settings.adapter!r} with train={settings.train!r} leaves nothing to fit in the decoder blocks "
            f"of {type(model).__name__}: no block has both pruned weights and something to train"
        )
    _check_own(model, blocks, training)
    source = DenseBlocks(dense, model, blocks, [f"{b}.{w}" for b, names in training.weights.items() for w in names])
    _check_weights(model, source, training.weights, masks)

    with quiet_model(model, freeze=False), restored_on_failure() as originals:
        torch.manual_seed(seed)
        device = None if settings.offload is None else torch.device(settings.offload)
        stacks = [stack for stack in find_stacks(model) if any(training.fits(name, block) for name, block in stack)]
        places = {name: place for place, (name, _) in enumerate(blocks)}
        taken = _taken_apart(on_device(model, batches), settings)
        calibrating = Samples(model, taken, settings.num_samples, _run_body, forward_context, offload=device)
        walks = walk_stacks(calibrating, [[block for _, block in stack] for stack in stacks], errors=ranks)
        errors = []
        with progress_bar("Reconstructing blocks", sum(map(len, stacks)), progress) as advance:
            for position, walk in walks:
                fitter = WindowFitter(walk, settings, seed, ranks)
                given = [batch.hidden for batch in walk.batches]  # to the dense blocks
                for index, (name, _) in enumerate(stacks[position]):
                    weights = source.weights(places[name])
                    for window in cut(walk, index, name, training.weights[name], settings.window == "half"):
                        wanted = _targets(walk, window, weights, given if settings.teacher == "dense" else None)
                        errors.append(_fitted(fitter, window, wanted, training, originals))
                    for _ in walk.run(index, keep_output=True):
                        pass
                    given = wanted if settings.teacher == "dense" else given
                    advance()
    return Reconstruction(tuple(errors))


def _run_body(model: nn.Module, batch: Any) -> None:
    forward(model, batch, ())


def _taken_apart(batches: Iterable[Any], settings: ReconstructSettings) -> Iterator[Any]:
    """Batches of at most so many samples as a step is to take; those that cannot be taken apart as they are."""
    for batch, size in samples(batches, settings.num_samples):
        step = settings.batch_size
        if step is None or batch_size(batch) is None:
            yield batch
        else:
            yield from (take(batch, start, min(start + step, size)) for start in range(0, size, step))


@torch.no_grad()
def _targets(
    walk: BlockWalk, window: Window, weights: Mapping[str, Tensor], given: Sequence[Tensor] | None
) -> list[Tensor]:
    """What the dense window makes of its inputs, ``[B, T, D]`` for each batch.

    Args:
        walk: Has reached the window's block.
        window: The window.
        weights: Dense weights of the block.
        given: Inputs of the dense block; None: the window is given what the pruned one is.
    """
    if given is None:
        weights = {name: weight for name, weight in weights.items() if name in window.parameters}
    inputs = [batch.hidden for batch in walk.batches] if given is None else given
    pairs = zip(walk.batches, inputs, strict=True)
    return [walk.put_by(window.run(walk, batch, hidden, weights)) for batch, hidden in pairs]


def _fitted(
    fitter: WindowFitter, window: Window, wanted: Sequence[Tensor], training: _Training, originals: Originals
) -> BlockError:
    """Fit one window, or leave it as it was where that did not lower its error."""
    block, energy = fitter.walk.blocks[window.index], fitter.energy(wanted)
    before = _share(fitter.error(window, wanted), energy)
    if not training.fits(window.block, block, window.parameters):
        return BlockError(window.name, before, before, False)
    _check_finite(window.name, before, "before it was fitted: the model or the calibration data is broken")
    with training.on(window, block) as (changing, mask_gradients):
        for parameter in changing:
            originals.keep(parameter)
        fitter.train(window, wanted, energy, mask_gradients)
    after = _share(fitter.error(window, wanted), energy)
    rate = fitter.settings.learning_rate
    _check_finite(window.name, after, f"after it was fitted: use a learning_rate below {rate}")
    if after < before:
        return BlockError(window.name, before, after, True)
    originals.restore(changing)
    return BlockError(window.name, before, before, False)


def _share(error: float, energy: float) -> float:
    return error / energy if energy else error


def _check_finite(name: str, error: float, when: str) -> None:
    if not math.isfinite(error):
        raise CalibrationError(f"the error of {name!r} is not finite {when}. The weights are unchanged")


# -- what is trained of a window -------------------------------------------------------------------------------------

_Changing = tuple[list[nn.Parameter], Callable[[], None]]


class _Training(Protocol):
    """What a window is fitted with."""

    @property
    def weights(self) -> Mapping[str, list[str]]:
        """Names in a block of its pruned weights that are retrained, by the block's name."""

    def fits(self, name: str, block: nn.Module, within: Collection[str] | None = None) -> bool:
        """Return whether a block, or those of its parameters, has pruned weights and something to train."""

    def trained(self, name: str, block: nn.Module) -> dict[str, nn.Parameter]:
        """Return the block's own parameters that are trained, by their names in it."""

    def on(self, window: Window, block: nn.Module) -> AbstractContextManager[_Changing]:
        """Let a window be trained inside: what requires a gradient in the block; merge it at the end.

        Gives the parameters that training and merging will change, and what masks their gradients.
        """


class _Adapters:
    """Adapters on the pruned layers, and parts of the block."""

    def __init__(
        self,
        settings: ReconstructSettings,
        masks: Mapping[str, Tensor],
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
    ) -> None:
        self.settings, self.masks = settings, masks
        names = adapted_modules(model, settings.adapter or "mask_lora", settings.lora_options, masks)
        self.weights = _by_block([f"{name}.weight" for name in names], blocks)

    def fits(self, name: str, block: nn.Module, within: Collection[str] | None = None) -> bool:
        has_pruned, trained = _any_within(self.weights[name], within), self.trained(name, block)
        return has_pruned and (self.settings.adapter is not None or _any_within(trained, within))

    def trained(self, name: str, block: nn.Module) -> dict[str, nn.Parameter]:
        return select_parameters(block, self.settings.parts)

    @contextmanager
    def on(self, window: Window, block: nn.Module) -> Iterator[_Changing]:
        adapter, options = self.settings.adapter, self.settings.lora_options
        layers = [w.removesuffix(".weight") for w in self.weights[window.block] if w in window.parameters]
        kept = {name: value for name, value in options.items() if name not in _SELECTING}
        trained = self.trained(window.block, block)
        changing = [p for name, p in trained.items() if name in window.parameters]
        changing += [block.get_parameter(f"{layer}.weight") for layer in layers if adapter is not None]
        try:
            chosen = {**kept, "target_modules": layers} if adapter is not None else {}
            attach(block, adapter, _masks_in(window.block, self.masks), self.settings.parts, chosen)
            for name, parameter in trained.items():
                parameter.requires_grad_(name in window.parameters)
            yield changing, lambda: None
            merge(block)
        except BaseException:
            with uninterrupted():
                if find_retraining(block) is not None:
                    remove_adapters(block)
            raise


class _KeptWeights:
    """Every weight that pruning could take and has kept, biases and norms."""

    def __init__(
        self,
        settings: ReconstructSettings,
        masks: Mapping[str, Tensor],
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
    ) -> None:
        self.settings, self.masks = settings, masks
        parameters = named_weights(model)
        self._prunable = _by_block([t.name for t in find_targets(model, frozen=True)], blocks)
        self.weights = {
            block: [w for w in names if _has_pruned(parameters[f"{block}.{w}"], masks.get(f"{block}.{w}"))]
            for block, names in self._prunable.items()
        }

    def fits(self, name: str, block: nn.Module, within: Collection[str] | None = None) -> bool:
        return _any_within(self.weights[name], within)

    def trained(self, name: str, block: nn.Module) -> dict[str, nn.Parameter]:
        parts = select_parameters(block, self.settings.parts)
        return {**parts, **{weight: block.get_parameter(weight) for weight in self._prunable[name]}}

    @contextmanager
    def on(self, window: Window, block: nn.Module) -> Iterator[_Changing]:
        trained = {n: p for n, p in self.trained(window.block, block).items() if n in window.parameters}
        masks = _masks_in(window.block, self.masks)
        held = [name for name in trained if name in self._prunable[window.block] or name in masks]
        enforcer = Enforcer(
            {name: trained[name] for name in held},
            {name: masks.get(name, trained[name].detach() != 0) for name in held},
        )
        flags = {parameter: parameter.requires_grad for parameter in block.parameters()}
        chosen = set(trained.values())
        try:
            for parameter in flags:
                parameter.requires_grad_(parameter in chosen)
            yield list(trained.values()), enforcer.mask_gradients
            enforcer.mask_weights()
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def _has_pruned(weight: Tensor, mask: Tensor | None) -> bool:
    return not bool((weight.detach() if mask is None else mask).all())


def _any_within(names: Iterable[str], within: Collection[str] | None) -> bool:
    return any(within is None or name in within for name in names)


def _masks_in(block: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of one block, by names in it."""
    return {name.removeprefix(f"{block}."): m for name, m in masks.items() if name.startswith(f"{block}.")}


def _by_block(names: Sequence[str], blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, list[str]]:
    return {block: [n.removeprefix(f"{block}.") for n in names if n.startswith(f"{block}.")] for block, _ in blocks}


def _check_own(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], training: _Training) -> None:
    """Refuse what two blocks share: fitted in the second, it would change the first, which is done."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for block, module in blocks:
        for name, parameter in training.trained(block, module).items():
            shared = users[id(parameter)]
            if not all(user.startswith(f"{block}.") for user in shared):
                raise ValueError(
                    f"{name!r} of the block {block!r} is one parameter with others ({', '.join(shared)}), so that "
                    "fitting it there would change them too: remove its part from train, or untie them"
                )


def _check_weights(
    model: nn.Module, source: DenseBlocks, pruned: Mapping[str, list[str]], masks: Mapping[str, Tensor]
) -> None:
    """Masks must hold, and the first pruned weight must have been there before."""
    weights = named_weights(model)
    for name in (f"{block}.{weight}" for block, names in pruned.items() for weight in names):
        if name in masks:
            checked_mask(name, masks[name], weights[name].detach())
    for index, (block, names) in enumerate(pruned.items()):
        for weight in names:
            name = f"{block}.{weight}"
            mask = masks.get(name)
            gone = weights[name].detach() == 0 if mask is None else ~mask.to(weights[name].device)
            if bool(gone.any()):
                check_is_dense(name, source.weights(index)[weight], gone)
                return


# -- fitting ---------------------------------------------------------------------------------------------------------

# arXiv 2312.15230, section 4: AdamW without weight decay, a linear schedule with 10 % warm-up.
_WARMUP = 0.1


def squared_sum(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the sum of squares over real tokens, in float32 at least.

    Args:
        values: ``[B, T, D]``.
        real: ``[B, T]`` bool, True where a token is real, or None.
    """
    # Chosen, not multiplied with 0: what a block makes of padding may be NaN.
    values = values if real is None else values[real]
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().sum()


def squared_error(output: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """Return the sum of squared differences over real tokens, in float32 at least; arguments as `squared_sum`."""
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return squared_sum(output.to(wide) - target.to(output.device, wide), real)


@dataclass(frozen=True)
class WindowFitter:
    """Fits windows of a walk's blocks, each on the hidden states that the walk has reached.

    Attributes:
        walk: Inputs of the block that is next, and what else it receives.
        settings: Steps and learning rate.
        seed: Of the order of batches.
        ranks: The processes whose gradients and errors are added up, or None.
    """

    walk: BlockWalk
    settings: ReconstructSettings
    seed: int
    ranks: Ranks | None

    @torch.no_grad()
    def energy(self, targets: Sequence[Tensor]) -> float:
        """Return the squares of the targets of every batch, ``[B, T, D]`` each, summed over real tokens and ranks."""
        pairs = zip(self.walk.batches, targets, strict=True)
        return self._over_ranks(sum(float(squared_sum(t.to(b.device), b.keep)) for b, t in pairs))

    @torch.no_grad()
    def error(self, window: Window, targets: Sequence[Tensor]) -> float:
        """Return the squared differences between outputs and targets, summed over real tokens and ranks."""
        total = 0.0
        for batch, target in zip(self.walk.batches, targets, strict=True):
            total += float(squared_error(window.run(self.walk, batch, batch.hidden), target, batch.keep))
        return self._over_ranks(total)

    @torch.enable_grad()
    def train(
        self, window: Window, targets: Sequence[Tensor], energy: float, mask_gradients: Callable[[], None]
    ) -> None:
        """Train what requires a gradient in the window's block on the squared error; ``.grad`` are as before then.

        Args:
            window: The window.
            targets: ``[B, T, D]`` for each batch.
            energy: Of the targets: the loss is a share of it, so that learning rates mean the same in every window.
            mask_gradients: Called before each step.
        """
        parameters = [p for p in self.walk.blocks[window.index].parameters() if p.requires_grad]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        # Steps of narrow weights would be lost to rounding.
        wide = {p: p.detach().float().requires_grad_() for p in parameters if p.element_size() < 4}
        stepped = [wide.get(p, p) for p in parameters]
        optimizer = torch.optim.AdamW(stepped, lr=self.settings.learning_rate, weight_decay=0.0)
        steps = self._steps()
        factor = partial(learning_rate_factor, steps=steps, warmup_steps=round(_WARMUP * steps), schedule="linear")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scale = 1.0 / max(energy / self._tokens(), torch.finfo(torch.float32).tiny)
        try:
            for _, position in zip(range(steps), self._order(), strict=False):
                batch = self.walk.batches[position]
                output = window.run(self.walk, batch, batch.hidden)
                error = squared_error(output, targets[position], batch.keep)
                tokens = output[..., 0].numel() if batch.keep is None else int(batch.keep.sum())
                (error * (scale / max(tokens, 1))).backward()  # type: ignore[no-untyped-call]
                self._average(parameters)
                mask_gradients()
                for narrow, copy in wide.items():
                    copy.grad, narrow.grad = None if narrow.grad is None else narrow.grad.float(), None
                optimizer.step()
                for narrow, copy in wide.items():
                    narrow.data.copy_(copy.detach())
                schedule.step()
                optimizer.zero_grad()
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    def _steps(self) -> int:
        """Optimizer steps: as many on every rank."""
        if self.settings.steps is not None:
            return self.settings.steps
        assert self.settings.epochs is not None
        counts = [len(self.walk.batches)]
        every = [counts] if self.ranks is None else self.ranks.gather(counts)
        return self.settings.epochs * max(count for (count,) in every)

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
            if parameter.grad is None:  # an expert that no token of this rank chose
                parameter.grad = torch.zeros_like(parameter)
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
        """Return the weights of one block by their names in it, of its own dtype and device.

        What is missing is the block's own, copied: fitting a first half must not change what the second is to do.

        Raises:
            ValueError: a weight has another shape than the pruned model's.
        """
        block, module = self._blocks[index]
        wanted = {self._sources.get(f"{block}.{clean_name(name)}"): (name, p) for name, p in module.named_parameters()}
        found = {
            name: p.detach().clone()
            for name, p in module.named_parameters()
            if f"{block}.{clean_name(name)}" not in self._sources
        }
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
