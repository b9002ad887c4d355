"""`reconstruct`: fit every decoder block of a pruned model to what the dense block computes, block after block.

Through adapters: PERP's layer-wise reconstruction, Zimmer et al. 2023, arXiv 2312.15230. All kept weights of half
blocks: "A free lunch", arXiv 2510.14444. No loss and no backward pass through the whole model: one block, its two
versions and its activations are all that is worked on at a time.

Letters: B samples, T tokens, D hidden channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError
from lightning_prune.naming import clean_name, uncompiled
from lightning_prune.perp.adapters import check_plain_model
from lightning_prune.perp.fitting import Adapters, KeptWeights, Training, WindowFitter
from lightning_prune.perp.masks import checked_mask
from lightning_prune.perp.options import ReconstructSettings
from lightning_prune.perp.windows import Window, cut
from lightning_prune.progress import progress_bar
from lightning_prune.pruning.batches import batch_size, samples, take
from lightning_prune.pruning.blocks import BlockWalk, Samples, walk_stacks
from lightning_prune.pruning.masks import check_masks, named_weights
from lightning_prune.pruning.running import ForwardContext, forward, on_device, quiet_model
from lightning_prune.pruning.stacks import stacks_to_walk
from lightning_prune.ranks import Ranks
from lightning_prune.safety import Originals, restored_on_failure

_OWN_BATCHES = "give batches that the model takes by itself (in PERPRetraining: reconstruct={'calibration': ...}), or "
_RATES = (1.0, 0.25)  # shares of the learning rate that are tried


@dataclass(frozen=True)
class BlockError:
    """How far a window's outputs are from the dense ones: squared differences over squared dense outputs.

    Attributes:
        name: Of the block, such as ``model.layers.0``, and of its half where it has two.
        before: Before it was fitted, on the outputs of the windows before it, which are fitted already.
        after: After it was fitted and merged.
        changed: False where the window has nothing pruned, or where fitting did not lower its error at any rate: then
            its weights are as they were.
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
    loss_fn: Callable[[nn.Module, Any], Any] | None = None,
    **options: Any,
) -> Reconstruction:
    """Fit each decoder block of a pruned model, or its halves, to the dense one's outputs; every zero stays.

    A window is trained by AdamW (no weight decay; linear schedule, 10 % warm-up) on the mean squared error of its
    outputs over real tokens, through adapters that are merged before the next one begins, or with all its kept weights
    (``train="all"``). Its inputs are the outputs of the fitted windows before it, so it also makes up for what they
    could not. One that fitting did not improve is fitted again at a quarter of the rate, and put back if that did not
    either. With `share` below 1 all weights go back a part of the way at the end. Works on masks of any score. If
    anything fails or is interrupted, every weight is bit-identical to before.

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
        loss_fn: ``loss_fn(model, batch)`` runs the model; its value is not used. Default: the model takes the batch.
        **options: Those of `ReconstructSettings` (``train``, ``adapter``, ``window``, ``steps`` or ``epochs``,
            ``batch_size``, ``learning_rate`` or ``relative_rate``, ``num_samples``, ``teacher``, ``share``,
            ``offload``), and for adapters those of `add_adapters`, without ``rank_pattern``, ``alpha_pattern`` and
            ``lora_dropout``.

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
    model = uncompiled(model)  # it runs eagerly, and what is changed is changed in place
    check_plain_model(model)
    masks = dict(masks or {})
    check_masks(model, masks)
    stacks = stacks_to_walk(model)
    blocks = [block for stack in stacks for block in stack]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} names no decoder blocks (_no_split_modules), and has no nn.ModuleList or "
            "nn.Sequential of modules of one class either, so there is nothing to go through block by block; train the "
            "whole model with add_adapters"
        )
    kind = KeptWeights if settings.train == "all" else Adapters
    training: Training = kind(settings, masks, model, blocks)
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
        stacks = [stack for stack in stacks if any(training.fits(name, block) for name, block in stack)]
        places = {name: place for place, (name, _) in enumerate(blocks)}
        taken = _taken_apart(on_device(model, batches), settings)
        calibrating = Samples(
            model,
            taken,
            settings.num_samples,
            loss_fn or _run_body,
            forward_context,
            offload=device,
            otherwise=("" if loss_fn is None else _OWN_BATCHES)
            + "leave reconstruct out, and train adapters, or the kept weights under hold_masks",
        )
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
        if settings.share < 1:
            originals.go_back(settings.share)
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
    fitter: WindowFitter, window: Window, wanted: Sequence[Tensor], training: Training, originals: Originals
) -> BlockError:
    """Fit one window, at a lower rate where that did not lower its error, or leave it as it was."""
    block, energy = fitter.walk.blocks[window.index], fitter.energy(wanted)
    before = _share(fitter.error(window, wanted), energy)
    if not training.fits(window.block, block, window.parameters):
        return BlockError(window.name, before, before, False)
    _check_finite(window.name, before, "before it was fitted: the model or the calibration data is broken")
    for share_of_rate in _RATES:
        with training.on(window, block) as (changing, mask_gradients):
            for parameter in changing:
                originals.keep(parameter)
            fitter.train(window, wanted, energy, mask_gradients, share_of_rate)
        after = _share(fitter.error(window, wanted), energy)
        if after < before:
            return BlockError(window.name, before, after, True)
        originals.restore(changing)
    _check_finite(window.name, after, f"after it was fitted: use a {fitter.settings.rate}")
    return BlockError(window.name, before, before, False)


def _share(error: float, energy: float) -> float:
    return error / energy if energy else error


def _check_finite(name: str, error: float, when: str) -> None:
    if not math.isfinite(error):
        raise CalibrationError(f"the error of {name!r} is not finite {when}. The weights are unchanged")


def _check_own(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], training: Training) -> None:
    """Refuse what two blocks share: fitted in the second, it would change the first, which is done."""
    users: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(parameter, []).append(name)
    for block, module in blocks:
        for name, parameter in training.trained(block, module).items():
            shared = users[parameter]
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


DenseSource = nn.Module | Mapping[str, Tensor]


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
        self._dense = _weights_of(dense, model)
        names = set(self._dense)  # asking a mapping whether it has a name may load the tensor
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
        for source, (name, own) in wanted.items():
            if source is None:
                continue
            tensor = self._dense[source]
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{source!r} of dense has shape {tuple(tensor.shape)}, but {tuple(own.shape)} in the pruned model: "
                    "give the model that was pruned, as it was before"
                )
            found[name] = tensor.detach().to(own.device, own.dtype)
        return found


def _weights_of(dense: DenseSource, model: nn.Module) -> Mapping[str, Tensor]:
    """All weights by name; of an opened checkpoint each is read when it is asked for."""
    if dense is model:
        raise ValueError("dense is the pruned model itself; give a copy of the model from before it was pruned")
    if isinstance(dense, nn.Module):
        return named_weights(dense)
    if not isinstance(dense, Mapping):
        raise TypeError(
            f"dense={type(dense).__name__} must be the dense model, its weights by name, or a checkpoint that "
            "lightning_prune.open_checkpoint(path) has opened"
        )
    return dense


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
