"""Keep a model's weights pruned in any training loop: `hold_masks`, on which `WeightPruning` stands too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_prune.naming import has_class
from lightning_prune.progress import warn
from lightning_prune.pruning.enforcement import Enforcer
from lightning_prune.pruning.masks import (
    PackedMasks,
    apply_masks,
    check_masks,
    current_weight,
    follow_names,
    named_weights,
    pack_masks,
    shard_masks,
    unpack_masks,
)
from lightning_prune.pruning.targets import RETRAINING
from lightning_prune.sharding import reshard

_STATE_VERSION = 1


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer | Iterable[Optimizer]) -> MaskHold:
    """Set pruned weights to zero now, and keep them there whatever loop trains the model.

    Works in a loop of one's own, and with Fabric, accelerate and transformers' ``Trainer``: on one device, under DDP,
    and with parameters that FSDP2 (``fully_shard``) or tensor parallelism shards.

    Args:
        model: The model that is trained, as it is or as DDP, Fabric or accelerate has wrapped it; sharded first, where
            it is to be.
        masks: Bool masks by parameter name, True = kept, of the parameters' shapes, as `prune` returns them; whole, or
            sharded as the parameters are.
        optimizer: The optimizer, or all of them, of the parameters as they are now; those that Fabric and accelerate
            have wrapped too.

    Returns:
        The hold, which lasts until `MaskHold.remove`, or to the end of a ``with`` block.

    Raises:
        ValueError: there are no masks, one does not fit its parameter, a masked parameter that is trained belongs to
            no optimizer given or is offloaded, or the model is sharded by FSDP1. Nothing is changed then.
        TypeError: `optimizer` is none.

    Example::

        masks = prune(model, batches, sparsity=0.5)
        with hold_masks(model, masks, optimizer):
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    """
    optimizers = [bare_optimizer(o) for o in (optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])]
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"model={type(model).__name__} is sharded by FSDP1 (FullyShardedDataParallel), whose flat parameters hide "
            "the weights; shard with FSDP2 (torch.distributed.fsdp.fully_shard), or train under DDP"
        )
    bare: Any = model
    while isinstance(bare, DistributedDataParallel) or type(bare).__name__ == "_FabricModule":
        bare = bare.module
    model = bare
    masks = follow_names(model, masks)
    weights = check_masks(model, masks)
    if away := [name for name, weight in weights.items() if weight.is_meta]:
        raise ValueError(
            f"{away[0]!r} has no data here (offloaded by a device_map, or on the meta device), so nothing trains it: "
            "load the model whole, or leave its mask out"
        )
    _check_stepped(weights, optimizers)
    hold = MaskHold(model, masks)
    hold.watch(optimizers)
    return hold


def bare_optimizer(optimizer: Any) -> Optimizer:
    """An optimizer without what Fabric, accelerate and Lightning wrap around it.

    One that steps another and changes weights itself, such as a Lookahead, is none of them.
    """
    bare = optimizer
    while isinstance(getattr(bare, "optimizer", None), Optimizer) and not _has_hooks(bare):
        bare = bare.optimizer
    if not isinstance(bare, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r:.80} is a {type(optimizer).__name__}; pass a torch.optim.Optimizer, or a list of "
            "all that train the model"
        )
    return bare


def _has_hooks(optimizer: object) -> bool:
    """Whether an optimizer calls hooks of its own around its steps; one of Fabric has those of what it wraps."""
    if not isinstance(optimizer, Optimizer) or has_class(optimizer, "_FabricOptimizer"):
        return False
    try:
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:  # it never called Optimizer.__init__, as accelerate's
        return False
    return True


def with_inner(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """Optimizers, and those that they step in turn: whoever trains may step these alone (SAM's second step)."""
    waiting, seen = list(optimizers), set[int]()
    while waiting:
        optimizer = waiting.pop(0)
        if id(optimizer) in seen:
            continue
        seen.add(id(optimizer))
        yield optimizer
        held = [value for name, value in vars(optimizer).items() if name != "state"]
        waiting += [inner for value in held for inner in (value, *_items(value)) if _has_hooks(inner)]


def _items(value: object) -> Iterable[Any]:
    """What an attribute holds several of; optimizers may hold others in a list, or by name."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _stands_still(optimizer: Optimizer) -> bool:
    """Whether a step changes no weight.

    ``torch.distributed.checkpoint`` makes such a step to have states to load into. By then the weights may be those of
    a checkpoint whose masks come last: those held until then must not touch them.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    # Asking a GPU for its learning rate would wait for it; that step's is on the CPU.
    return all(not (isinstance(rate, Tensor) and rate.device.type != "cpu") and rate == 0 for rate in rates)


def _check_stepped(weights: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    """Refuse to hold a trained parameter that an optimizer would step which nobody has named."""
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    strays = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in stepped]
    if strays:
        raise ValueError(
            f"{len(strays)} of {len(weights)} masked parameters are trained (requires_grad) by no optimizer given, "
            f"first {strays[0]!r}: pass every optimizer, made after the model was moved, wrapped or sharded; freeze "
            "what is not trained (requires_grad_(False))"
        )


# PEFT's adapters of which it is known that their merge leaves zeros at zero: factors, and biases.
_KEEP_ZEROS = ("HiraLayer", "IA3Layer", "BeftLayer")


def _warn_of_merges(model: nn.Module, weights: Iterable[nn.Parameter]) -> None:
    """Warn of adapters on pruned weights that PEFT would merge into their zeros, where nothing here could hold them."""
    pruned = {id(weight) for weight in weights}
    own = {module for parent in model.modules() if RETRAINING in parent.__dict__ for module in parent.modules()}
    dense = [
        (name, module)
        for name, module in model.named_modules()
        if has_class(module, "BaseTunerLayer")
        and module not in own
        and not any(has_class(module, kind) for kind in _KEEP_ZEROS)
        and any(id(p) in pruned for p in module.base_layer.parameters())
    ]
    if dense:
        name, module = dense[0]
        warn(
            f"{len(dense)} layers with pruned weights, first {name!r}, have adapters of PEFT "
            f"({type(module).__module__}.{type(module).__name__}): merged (merge_and_unload), these fill the zeros, "
            "and no mask holds by then. Keep them unmerged, or train those of lightning_prune.perp.add_adapters, whose "
            "merge keeps the zeros",
        )


class MaskHold:
    """The masks of a model in training, and the hooks that enforce them; `hold_masks` makes it.

    Gradients of pruned weights are zeroed as soon as they are there, before anyone clips them, and right before an
    optimizer steps if they have changed since (through ``.data``, which torch does not count, weights alone stay zero);
    weights right after. States of optimizers are zeroed when masks change. A parameter that was replaced, moved or
    renamed since the last step is masked in turn.

    Args:
        model: The model.
        masks: Bool masks by the names of its parameters.
        hook_gradients: Mask each gradient when it is accumulated; False where `mask_gradients` is called before
            gradients are clipped, which masks all of them at once.

    Raises:
        ValueError: see `hold_masks`.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], hook_gradients: bool = True) -> None:
        self._model, self._hooks = model, hook_gradients
        self._optimizers: list[Optimizer] = []
        self._handles: list[Any] = []
        self._gradient_hooks: dict[int, Any] = {}  # by the id of the parameter, which its enforcer keeps
        self._enforcer: Enforcer
        self.update(masks)
        _warn_of_merges(model, self._enforcer.weights.values())

    def __getstate__(self) -> dict[str, Any]:
        """What copies keep: no hooks, which are on the parameters and optimizers of this one."""
        return {**vars(self), "_handles": [], "_gradient_hooks": {}}

    @property
    def masks(self) -> PackedMasks:
        """Bool masks by parameter name, True = kept, sharded as the parameters are; held as bits."""
        return self._enforcer.masks()

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Hold to other masks from now on: weights are zeroed at once, and the optimizers' states with them.

        Args:
            masks: Bool masks by parameter name. A parameter without one is held no more.

        Raises:
            ValueError: there are none, or one does not fit its parameter; nothing is changed then.
        """
        reshard(self._model)  # FSDP2 leaves parameters gathered after a forward pass
        masks = shard_masks(self._model, follow_names(self._model, masks))
        if not masks:
            raise ValueError("masks is empty: there is nothing to hold")
        apply_masks(self._model, masks)
        weights = named_weights(self._model)
        self._enforcer = Enforcer({name: weights[name] for name in masks}, masks)
        self._enforcer.mask_gradients()  # those of an accumulation that has begun
        self._sharing = self._find_sharing()
        self.clear_states()
        self._hook_gradients()

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Enforce the masks around the steps of optimizers, those included that came later.

        Args:
            optimizers: Optimizers as torch has them, and with them any that they hold; those that are known already are
                passed over.
        """
        for optimizer in with_inner(optimizers):
            if any(optimizer is known for known in self._optimizers):
                continue
            self._optimizers.append(optimizer)
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            self._enforcer.mask_states(optimizer)

    def rename(self, rename: Callable[[str], str]) -> None:
        """Call the parameters by other names, such as those of layers that adapters were put around."""
        self._enforcer.rename(rename)

    def clear_states(self) -> None:
        """Zero the optimizers' states of pruned weights, such as those that a checkpoint has brought."""
        for optimizer in self._optimizers:
            self._enforcer.mask_states(optimizer)

    def follow(self) -> None:
        """Give the masks to the parameters that the model has now, if any was replaced or moved.

        Raises:
            RuntimeError: a masked parameter is gone, has got another shape, or is no longer shared by layers that were
                tied.
        """
        if not self._strangers():
            self._hook_gradients()
            return
        reshard(self._model)  # FSDP2 itself replaces parameters, for as long as they are gathered
        if not (strange := self._strangers()):
            return
        try:
            if torn := self._torn():
                raise ValueError(f"layers that shared {torn[0]!r} have parameters of their own now")
            self.update(self.masks)
        except ValueError as error:
            raise RuntimeError(
                f"the parameter {strange[0]!r} was replaced during training, and its mask cannot follow: {error}. "
                "Replace or shrink layers before masks are held, or when they are no more (MaskHold.remove), or leave "
                "them unpruned"
            ) from error
        warn(
            f"{len(strange)} pruned parameters ({strange[0]}, ...) were replaced during training; their masks hold for "
            "the new ones from now on",
        )

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, before they are clipped; of those that have changed."""
        self._enforcer.mask_gradients()

    def mask_unstepped(self) -> None:
        """Set pruned weights to zero that no optimizer known here steps: one may step copies, and write them back."""
        stepped = {id(p) for optimizer in self._optimizers for p in self._enforcer.parameters_of(optimizer)}
        weights = self._enforcer.weights.values()
        self._enforcer.mask_weights(p for p in weights if p.requires_grad and id(p) not in stepped)

    def mask_weights(self) -> dict[str, int]:
        """Set pruned weights to zero that something else than an optimizer has changed.

        Returns:
            How many there were of each parameter (of its part on this rank); empty if masks held.
        """
        revived = self._enforcer.resurrected()
        if revived:
            self._enforcer.mask_weights()
        return revived

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _find_sharing(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """Modules, and what they call it, that share a masked parameter; of those that more than one has."""
        names = {id(weight): name for name, weight in self._enforcer.weights.items()}
        found: dict[str, list[tuple[nn.Module, str]]] = {}
        for module in self._model.modules():
            for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) in names:
                    found.setdefault(names[id(parameter)], []).append((module, own))
        return {name: places for name, places in found.items() if len(places) > 1}

    def _strangers(self) -> list[str]:
        enforcer = self._enforcer
        strange = [name for name in enforcer.weights if not enforcer.follows(name, current_weight(self._model, name))]
        return strange or self._torn()

    def _torn(self) -> list[str]:
        """Names of weights that tied layers shared, and do not share any more."""
        return [
            name
            for name, places in self._sharing.items()
            if len({id(getattr(module, own, None)) for module, own in places}) > 1
        ]

    def _hook_gradients(self) -> None:
        """Have every masked parameter that is trained zero its gradient when it is accumulated.

        Under DDP that is before the gradients are reduced over ranks, under FSDP2 after it.
        """
        weights = {id(weight): weight for weight in self._enforcer.weights.values()}
        for gone in self._gradient_hooks.keys() - weights.keys():
            self._gradient_hooks.pop(gone).remove()
        # The optimizers keep the hold. When they are gone, as after a loop that has failed, a model that lives on is as
        # it was.
        held = weakref.ref(self)

        def after_gradient(parameter: nn.Parameter) -> None:
            if (hold := held()) is None:
                return
            if not hold._enforcer.fits(parameter):
                hold.follow()
            hold._enforcer.mask_gradients((parameter,))

        for key, weight in weights.items():
            if self._hooks and weight.requires_grad and key not in self._gradient_hooks:
                hook: Any = weight.register_post_accumulate_grad_hook(after_gradient)  # type: ignore[no-untyped-call]
                self._gradient_hooks[key] = hook
                weakref.finalize(self, hook.remove)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.follow()
        # Gradients may have been written by hand, or changed since they were accumulated.
        self._enforcer.mask_gradients(self._enforcer.parameters_of(optimizer))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not _stands_still(optimizer):
            self._enforcer.mask_weights(self._enforcer.parameters_of(optimizer))

    def remove(self) -> None:
        """Let go of the model and the optimizers: nothing is enforced from now on. Masks stay to be read."""
        for handle in (*self._handles, *self._gradient_hooks.values()):
            handle.remove()
        self._handles, self._optimizers, self._gradient_hooks = [], [], {}

    def __enter__(self) -> MaskHold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks as bits (uint8 tensors) that load under ``weights_only=True``.

        Where weights are sharded every rank must call, and rank 0 alone gets the bits.
        """
        return {"version": _STATE_VERSION, "masks": pack_masks(self.masks)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Hold to the masks of a checkpoint, after the model and the optimizers have taken their states from it.

        Args:
            state_dict: What `state_dict` gave; on every rank that of rank 0.

        Raises:
            ValueError: it is of another kind or version, is damaged, or its masks do not fit the model; nothing is
                changed then.
        """
        if state_dict.get("version") != _STATE_VERSION or not isinstance(state_dict.get("masks"), Mapping):
            raise ValueError(
                f"state_dict has version {state_dict.get('version')!r} and keys {sorted(map(str, state_dict))}; it "
                f"must be what MaskHold.state_dict gave (version {_STATE_VERSION}, masks)"
            )
        if not state_dict["masks"]:
            raise ValueError(
                "state_dict holds no masks: where weights are sharded rank 0 alone gets them; load its state on every "
                "rank"
            )
        self.update(unpack_masks(state_dict["masks"]))
