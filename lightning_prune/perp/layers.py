"""Adapt the pruned weight of a linear layer with PEFT's LoRA, in five ways, and merge the adapter into it.

`CombinedLinear` is also the base of variants of your own, see `register_adapter`. The classes subclass
`peft.tuners.lora.Linear`, so parameter names, adapter switching and checkpoints are PEFT's. They are given to PEFT by
``LoraConfig._register_custom_module``, which it documents as experimental.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lightning_prune.naming import plain_name
from lightning_prune.perp.effective import (
    Combine,
    Elementwise,
    effective_linear,
    effective_weight,
    kept_by_sign,
    masked_growth,
    masked_product,
    masked_sum,
    thin_product,
)
from lightning_prune.pruning.clearing import to_bytes
from lightning_prune.pruning.layer_kinds import layer_kind
from lightning_prune.pruning.offloading import is_hooked
from lightning_prune.pruning.precision import full_precision
from lightning_prune.pruning.running import has_hooks
from lightning_prune.pruning.zeros import is_plain_product
from lightning_prune.sharding import (
    as_shard_of,
    count_over_ranks,
    gather_whole,
    is_sharded,
    local,
    refuse_shard_root,
    refuse_shards,
    shard_bounds,
    take_shard,
)


class SparseLayer(nn.Module, lora.LoraLayer):
    """A frozen pruned weight and one adapter: its mask, its two matrices and its merge, whatever layer multiplies.

    The mask lies beside the layer as a buffer of one byte a weight, which is not saved: it is the base weight's exact
    zeros until `set_masks` says otherwise. Where FSDP2 shards the weight, `set_masks` leaves each rank its part of the
    mask, and writes the mask into the weight's zeros (-0.0 where kept), from which a forward pass, which sees the whole
    weight, reads it. Outside of forward passes weights, masks and merged weights are a rank's parts.

    Attributes:
        parameter_name: What the base layer calls the weight.
        variant: How weight and adapter are combined.
        transposed: The weight is stored with its inputs first.
        stays_dense: Whether nothing of the weight is pruned, whatever zeros it has.
        kept: The mask, int8 of the weight's shape or of this rank's part of it: -1 (all bits) where kept, 0 where
            pruned.
    """

    parameter_name: str
    variant: type[SparseLinear]
    transposed: bool
    stays_dense: bool
    kept: Tensor
    _unmerged: Tensor | None

    def take_own_zeros(self) -> None:
        """Take the weight's own zeros for its mask."""
        weight = self.base_weight
        self.register_buffer("kept", to_bytes(weight.detach() != 0, weight.device), persistent=False)
        self._unmerged, self.stays_dense = None, False

    def own_name(self, path: str) -> str:
        """What `sparse_layers` calls this, from the base layer's path in the model."""
        return path

    def weight_name(self, name: str) -> str:
        """The weight's name in the model, from the name that `sparse_layers` has for this."""
        return f"{name}.{self.parameter_name}"

    def path(self, name: str) -> str:
        """The base layer's path in the model, from the name that `sparse_layers` has for this."""
        return name

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight, ``[O, I]``, or ``[I, O]`` if `transposed`; of experts a stack; a convolution's kernel."""
        weight = getattr(self.get_base_layer(), self.parameter_name)
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def base_part(self) -> Tensor:
        """This rank's part of the base weight, all of it where it is not sharded; shares its memory."""
        return local(self.base_weight.detach())

    @property
    def kept_part(self) -> Tensor:
        """The mask of `base_part`."""
        part = self.base_part
        kept = self.kept if self.kept.shape == part.shape else take_shard(self.base_weight, self.kept).contiguous()
        return kept.to(part.device)

    @torch.no_grad()
    def hold(self, kept: Tensor, gathered: torch.dtype | None = None) -> None:
        """Take a mask that has been checked; where the weight is a shard every rank must call.

        Args:
            kept: Of `base_part`, bool. Of a shard it is also written into the zeros.
            gathered: The dtype that FSDP2 gathers the weight in; None: its own.
        """
        weight, part = self.base_weight, self.base_part
        if not is_sharded(weight):
            self.kept.copy_(to_bytes(kept, self.kept.device))
            return
        zero = part == 0
        part.masked_fill_(zero, 0.0).masked_fill_(zero & kept, -0.0)
        self.kept = to_bytes(kept, part.device)
        if gathered in (None, part.dtype):
            return
        # Weights too small for the dtype that FSDP2 gathers in would become +0.0, as if pruned. Such a layer holds its
        # mask whole: float32 weights have none of them in bfloat16 (below 1e-40), but may in float16 (3e-8).
        lost = as_shard_of(weight, kept & (kept_by_sign(part.to(gathered)) == 0))
        if count_over_ranks({"": lost}, lambda part: int(part.sum())):
            self.kept = to_bytes(gather_whole(as_shard_of(weight, kept.to(torch.uint8))).bool(), part.device)

    @property
    def is_off(self) -> bool:
        """Whether the base layer computes alone: the adapter is merged, disabled or deleted."""
        return self.disable_adapters or self.merged or not any(n in self.lora_A for n in self.active_adapters)

    def runs_alone(self, call: dict[str, Any]) -> bool:
        """Whether the base layer computes a call alone, with its own weight where the adapter is switched off.

        Args:
            call: Its keywords, from which those that PEFT adds are taken.

        Raises:
            ValueError: several adapters are asked for.
        """
        if call.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names (several adapters in one batch) is not supported beside a pruned weight")
        call.pop("alora_offsets", None)
        if self.is_off and self.disable_adapters and self.merged:
            self.unmerge()
        return self.is_off

    def weight_with_adapter(self) -> Tensor:
        """What the layer multiplies with in training, in the weight's dtype, differentiable by the two matrices."""
        return self.variant.training_weight(self.base_weight, self.mask_of_forward(), *self.factors())

    def mask_of_forward(self) -> Tensor | None:
        """The mask of the whole weight; None where the weight brings it along, see `kept_by_sign`."""
        weight = self.base_weight
        return self.kept.to(weight.device) if self.kept.shape == weight.shape else None

    def check_sharded_with_adapter(self) -> None:
        """Refuse a layer that FSDP2 shards by itself.

        Raises:
            ValueError: of a base layer the adapter would be left out, and every rank would train its own; with its
                adapter it does not outlive the merge, after which nothing would gather its weight.
        """
        refuse_shard_root(
            self,
            "fully_shard was called on a layer with an adapter, or on experts with theirs, which the merge takes off; "
            "call it on decoder blocks and on the transformers model",
        )
        refuse_shard_root(
            self.get_base_layer(),
            "fully_shard was called on a linear layer without its adapter, or on experts without theirs; call it on "
            "decoder blocks and on the transformers model, so that both are sharded together",
        )

    def check_gathered(self) -> None:
        """Refuse to compute with a shard."""
        self.check_sharded_with_adapter()
        refuse_shards(
            self.base_weight,
            "the weight of a layer with an adapter is a shard (DTensor) in its own forward pass: use FSDP2 without "
            "tensor parallelism, call fully_shard on decoder blocks and on the transformers model, and call the "
            "model as a whole",
        )

    # -- the two matrices --------------------------------------------------------------------------------------------

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The adapter's parameters, A ``[r, I]`` and B ``[O, r]``; of experts a stack of each."""
        (name,) = self.lora_A
        a, b = (getattr(stack[name], self.parameter_name) for stack in (self.lora_A, self.lora_B))
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b

    def begin_anew(self, init_lora_weights: bool | str) -> None:
        """Give the adapter initial values again."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """``L [P, r]`` and ``R [r, Q]`` of `effective`, whole, the scaling in L."""
        a, b = (gather_whole(matrix) for matrix in self.matrices())
        return self.variant.factors_of(a, b, **self.combining())

    def factors_of_part(self) -> tuple[Tensor, Tensor]:
        """`factors` of `base_part`; where the weight is a shard every rank must call."""
        left, right = self.factors()
        bounds = tuple(slice(*bounds) for bounds in shard_bounds(self.base_weight))
        columns = (*bounds[:-2], slice(None), bounds[-1])
        return left[bounds[:-1]], right[columns]

    def combining(self) -> dict[str, Any]:
        """What has to be known of the layer to combine stored tensors, in plain values."""
        (name,) = self.lora_A
        return {"scaling": float(self.scaling[name]), "transposed": self.transposed}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """What the base weight becomes when the adapter is merged; +0.0 where pruned.

        Of a sharded weight it is this rank's part; the thin factors are gathered for it, so every rank must call.

        Raises:
            ValueError: the variant cannot be merged.
        """
        if not self.variant.mergeable:
            raise ValueError(
                f"adapter={self.variant.adapter!r} cannot be merged: B A is dense and would fill the zeros of the "
                "pruned weights. Keep the adapter apart (save_adapter), or train with adapter='mask_lora'"
            )
        weight, (left, right) = self._part_before_merge(), self.factors_of_part()
        with full_precision():  # a merge in a training hook may run under autocast
            return self.variant.combination()(weight, self.kept_part, left, right, None)

    @torch.no_grad()
    def merged_with(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`merged_weight` of other tensors than the layer's own, such as averages of them; none may be sharded."""
        if self.merged:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            factors = self.variant.factors_of(a, b, **self.combining())
            return self.variant.combination()(weight, self.kept.to(weight.device), *factors, None)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight (to this rank's part of it)."""
        return self.merged_weight() - self._part_before_merge()

    def _part_before_merge(self) -> Tensor:
        part = self.base_part
        return part if self._unmerged is None else self._unmerged.to(part.device)

    # -- merging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the merged weight into the base layer, and keep the old one for `unmerge`.

        Args:
            safe_merge: No difference: the result is always checked before it is written.
            adapter_names: As in PEFT.

        Raises:
            ValueError: the merged weight is not finite, or the variant cannot be merged; nothing is written.
        """
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in chosen if name in self.lora_A and name not in self.merged_adapters]
        if not names:
            return
        merged = self.merged_weight()
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(f"the merged weight has values that are not finite; the adapter {names[0]!r} is broken")
        # Subtracting what was added would not give the old weight back: the sum was rounded.
        self._unmerged = self.base_part.clone()
        self.base_part.copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def fold(self, init_lora_weights: bool | str) -> None:
        """Write the merged weight into the base layer for good, and give the adapter initial values again."""
        if not self.merged:
            self.base_part.copy_(self.merged_weight())
        self._unmerged = None
        self.merged_adapters.clear()
        self.begin_anew(init_lora_weights)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was, to the bit."""
        if self._unmerged is None:
            return
        self.base_part.copy_(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def finish(self) -> None:
        """Let the base weight stay as it is: there is no way back, and its zeros no longer say what is kept."""
        self._unmerged = None
        if is_sharded(self.base_weight):
            self.base_part.add_(0.0)  # -0.0 + 0.0 is +0.0


class SparseLinear(SparseLayer, lora.Linear):
    """A frozen pruned linear layer and one adapter; the base of all variants.

    Attributes:
        adapter: The variant's name.
        inits: Values of ``init_lora_weights`` that it takes.
        scaled: Whether ``lora_alpha`` scales the product.
        mergeable: Whether it can be merged.
    """

    adapter: ClassVar[str]
    inits: ClassVar[tuple[bool | str, ...]] = (True, False, "gaussian")
    scaled: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    parameter_name = "weight"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        check_base_layer(str(kwargs.get("target_name", "")), base_layer)
        transposed = isinstance(base_layer, Conv1D)
        kwargs["is_target_conv_1d_layer"] = transposed
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        # One configuration serves a model that has both kinds of layer.
        self.fan_in_fan_out = self.transposed = transposed
        self.variant = type(self)
        self.take_own_zeros()

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with, for code that multiplies by itself: ``F.linear(x, layer.weight)``.

        The base weight outside of forward passes of shards, and where the adapter is merged or off.
        """
        base = self.base_weight
        if self.merged or self.disable_adapters or is_sharded(base) or not len(self.lora_A):
            return base
        return self.weight_with_adapter()

    @classmethod
    def combination(cls) -> Combine:
        """How weight and adapter become one matrix."""
        return masked_sum

    @classmethod
    def factors_of(cls, a: Tensor, b: Tensor, scaling: float, transposed: bool) -> tuple[Tensor, Tensor]:
        """`factors` of matrices that are in no layer, such as those of a checkpoint; the rest is of `combining`."""
        left, right = (a.mT, b.mT) if transposed else (b, a)
        return left * scaling if cls.scaled else left, right

    @classmethod
    def training_weight(cls, weight: Tensor, mask: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        """What training multiplies with; arguments as of `effective_weight`."""
        with torch.autocast(weight.device.type, enabled=False):
            return (thin_product(weight, left, right) + weight).to(weight.dtype)

    # As nn.Linear calls it; PEFT hands it on by position.
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """PEFT's: ``[..., I]`` to ``[..., O]``, the adapter's output added to the layer's."""
        self.check_gathered()
        y: Tensor = super().forward(input, *args, **kwargs)
        return y

    # -- what PEFT asks for while it builds the adapter --------------------------------------------------------------

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        """Refuse DoRA and PEFT's other variants, which combine the weights in ways of their own."""
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.metadata.get("is_lora_variant") and value:
                raise ValueError(
                    f"{field.name}={value!r} is a LoRA variant of PEFT that does not go with adapter={self.adapter!r}; "
                    "leave it out"
                )

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Build the adapter's two matrices.

        Raises:
            ValueError: the layer has an adapter already, or `config` asks for what the variant cannot do.
        """
        if len(self.lora_A):
            raise ValueError(
                f"the layer has the adapter {next(iter(self.lora_A))!r}, so {adapter_name!r} cannot be added: only one "
                "adapter can be combined with a pruned weight; merge the first, or delete it"
            )
        if config.lora_bias:
            raise ValueError("lora_bias=True is not supported; train the layers' own biases with train=('bias',)")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: another LoRA would not be masked."""
        return False

    def begin_anew(self, init_lora_weights: bool | str) -> None:
        """See `SparseLayer.begin_anew`."""
        (name,) = self.lora_A
        with self._whole_matrices(name):
            self.reset_lora_parameters(name, init_lora_weights)  # type: ignore[no-untyped-call]

    @contextmanager
    def _whole_matrices(self, name: str) -> Iterator[None]:
        """Have whole matrices in the place of shards, so that initial values are those of one process."""
        modules = (self.lora_A[name], self.lora_B[name])
        shards = [(m, s, local(s.detach())) for m, s in zip(modules, self.matrices(), strict=True) if is_sharded(s)]
        for module, shard, part in shards:
            module.weight = nn.Parameter(torch.empty(shard.shape, dtype=part.dtype, device=part.device))
        try:
            yield
        finally:
            for (module, shard, part), whole in zip(shards, [m.weight for m, _, _ in shards], strict=True):
                assert isinstance(whole, Tensor)
                part.copy_(take_shard(shard, whole.detach()))
                module.weight = shard


class CombinedLinear(SparseLinear):
    """A variant whose forward pass multiplies with the combined weight, so that training sees the merged model.

    A variant of your own is a subclass that sets `adapter` and overrides `combine`.
    """

    @staticmethod
    def combine(weight: Tensor, product: Tensor) -> Tensor:
        """The combined weight, element by element; what it is where pruned does not matter.

        Args:
            weight: The frozen weight, ``[O, I]``, or ``[I, O]`` of a Conv1D, or a stack of such, of experts, or the
                kernel of a convolution; float32 at least. Not to be changed.
            product: s B A, of the same shape and dtype. Zero at the start.

        Returns:
            Of the same shape and dtype, differentiable by `product`; `weight` where the product is zero.
        """
        raise NotImplementedError

    @classmethod
    def combination(cls) -> Combine:
        """See `SparseLinear.combination`."""
        return Elementwise(cls.combine)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """See `SparseLinear.update_layer`; dropout is refused too."""
        if config.lora_dropout:
            raise ValueError(
                f"lora_dropout={config.lora_dropout!r} must be 0 for adapter={self.adapter!r}: it would drop inputs of "
                "the adapter alone, but adapter and weight are one matrix here; use weight decay, or "
                "adapter='lora_prune'"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """``[..., I]`` to ``[..., O]``."""
        self.check_gathered()
        base = self.base_layer
        if self.runs_alone(kwargs):
            y: Tensor = base(input, *args, **kwargs)
            return y
        if not has_hooks(base):
            return self._effective(input, *args, **kwargs)  # which takes no more, as a linear layer
        # Someone watches the layer (calibration does): let it be called, but multiply with the combined weight.
        base.forward = self._effective
        try:
            y = base(input, *args, **kwargs)
        finally:
            del base.forward
        return y

    def _effective(self, x: Tensor) -> Tensor:
        weight, bias = self.base_weight, self.get_base_layer().bias
        assert bias is None or isinstance(bias, Tensor)
        factors = self.factors()
        return effective_linear(x, weight, self.mask_of_forward(), *factors, bias, self.combination(), self.transposed)

    @classmethod
    def training_weight(cls, weight: Tensor, mask: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        """See `SparseLinear.training_weight`."""
        return effective_weight(weight, mask, left, right, cls.combination())


class MaskLoRALinear(CombinedLinear):
    """``W + M * (s B A)``, while training and merged alike (MaskLoRA)."""

    adapter = "mask_lora"

    @classmethod
    def combination(cls) -> Combine:
        """See `SparseLinear.combination`."""
        return masked_sum


class ScaleLoRALinear(CombinedLinear):
    """``W * (B A)``, which is W at the start (ScaleLoRA).

    With every entry of A and B at ``1 / sqrt(r)``, as the paper has it, all r components of the product get the same
    gradient and stay equal: the rank never grows over 1. ``init_lora_weights="gaussian"`` starts from the same weight
    without that: one component of ones, and r - 1 as LoRA's, random in A and zero in B.
    """

    adapter = "scale_lora"
    inits = (True, "gaussian")
    scaled = False  # the paper's form has no scaling

    @classmethod
    def combination(cls) -> Combine:
        """See `SparseLinear.combination`."""
        return masked_product

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialize so that ``B A`` is 1 everywhere."""
        (a, b), r = self.matrices(), self.r[adapter_name]
        if init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / r)
            nn.init.zeros_(b)
            a[0], b[:, 0] = 1.0, 1.0
        else:
            nn.init.constant_(a, 1 / math.sqrt(r))
            nn.init.constant_(b, 1 / math.sqrt(r))


class HiRALinear(CombinedLinear):
    """``W + W * (B A)``, which is W at the start (HiRA, Huang et al. 2025, ICLR, openreview TwJrTz9cRS).

    The same function as PEFT's ``HiraConfig``, which merges it with zeros intact too; here it has a mask, written-out
    gradients, checkpoints and shards as the others have.
    """

    adapter = "hira"
    inits = (True, "gaussian")
    scaled = False  # neither has the paper's form

    @classmethod
    def combination(cls) -> Combine:
        """See `SparseLinear.combination`."""
        return masked_growth


class LoRAPruneLinear(SparseLinear):
    """``W + s B A`` while training; the mask meets the product only at the merge (LoRA-Prune).

    As cheap as plain LoRA, but the model that was trained is dense: merging changes what it computes.
    """

    adapter = "lora_prune"


class KeptLoRALinear(SparseLinear):
    """``W + s B A``, plain LoRA beside the pruned weight, never to be merged."""

    adapter = "lora"
    mergeable = False


def own_weight(layer: nn.Module) -> nn.Parameter | None:
    """Return a layer's weight if it is a parameter of the layer itself, neither computed nor missing."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def check_base_layer(name: str, layer: nn.Module) -> None:
    """Refuse what cannot be adapted.

    Raises:
        ValueError: the layer is no Linear or Conv1D, or its weight is quantized, sharded, offloaded, parametrized or
            without data, accelerate runs it, or its forward is none of a linear layer.
    """
    if not isinstance(layer, (nn.Linear, Conv1D)):
        kind = layer_kind(layer)
        what = kind.name if kind is not None else type(layer).__name__
        raise ValueError(
            f"{name!r} is a {what}; adapters go with nn.Linear, Conv1D, nn.Conv1d to Conv3d and experts, unquantized: "
            "leave it out of target_modules"
        )
    checked_weight(name, layer)
    if not _is_plain_product(layer):
        raise ValueError(
            f"the forward of {name!r} ({type(layer).__name__}) computes something else than the product of input and "
            "weight, or more, and an adapter would take its place: leave it out (exclude_modules)"
        )


def checked_weight(name: str, layer: nn.Module) -> nn.Parameter:
    """Return a layer's weight, to which an adapter can be put and merged.

    Raises:
        ValueError: it is no parameter of the layer itself; or see `check_base_weight`.
    """
    weight = own_weight(layer)
    if weight is None:
        raise ValueError(
            f"the weight of {name!r} is not a plain parameter (torch.nn.utils.prune or parametrize?); make it "
            "permanent first (prune.remove, remove_parametrizations)"
        )
    check_base_weight(name, layer, weight)
    return weight


def check_base_weight(name: str, layer: nn.Module, weight: nn.Parameter) -> None:
    """Refuse a weight, and a layer around it, that no adapter can be merged into.

    Raises:
        ValueError: it is quantized, sharded, offloaded, or without shape or data, or accelerate runs the layer.
    """
    refuse_shards(
        weight,
        f"the weight of {name!r} is sharded (DTensor) already; add adapters first, then call fully_shard, so that "
        "they are sharded with the weights",
    )
    if is_lazy(weight):
        raise ValueError(f"the weight of {name!r} has no shape yet (lazy layer); run the model once first")
    # bitsandbytes and torchao put tensor subclasses in the place of the weight, which may claim to be floating point.
    if not weight.is_floating_point() or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        raise ValueError(
            f"the weight of {name!r} is quantized ({type(weight.data).__name__}, {weight.dtype}): an adapter cannot be "
            "merged into it with its zeros kept. Load the model unquantized, retrain, merge, and quantize last"
        )
    if weight.is_meta:
        raise ValueError(f"the weight of {name!r} has no data here (meta device or offloaded); load the model whole")
    if is_hooked(layer):
        raise ValueError(
            f"{name!r} is run by accelerate, which spreads the model over devices (device_map), and an adapter would "
            "go around that; load the model on one device, or take the hooks off "
            "(accelerate.hooks.remove_hook_from_submodules) and move it there"
        )


def _is_plain_product(layer: nn.Module) -> bool:
    """Return whether a layer multiplies its input with its weight and adds its bias, and no more."""
    plain = "forward" not in vars(layer) and type(layer).forward in (nn.Linear.forward, Conv1D.forward)
    return plain or is_plain_product(layer, transposed=isinstance(layer, Conv1D))


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """The layers with a sparse adapter, by the name they had before (``model.layers.0.mlp.up_proj``).

    One of experts adapts one parameter, and has its name (``model.layers.0.mlp.experts.down_proj``).
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield module.own_name(plain_name(name)), module


_BUILT_IN = {cls.adapter: cls for cls in (MaskLoRALinear, ScaleLoRALinear, HiRALinear, LoRAPruneLinear, KeptLoRALinear)}
_VARIANTS: dict[str, type[SparseLinear]] = dict(_BUILT_IN)


def register_adapter(layer: type[CombinedLinear]) -> None:
    """Make a variant of your own known by its name, for ``adapter=`` everywhere; one of the same name is replaced.

    Files and checkpoints hold the name alone. A program that reads them has to register the variant first: nothing
    that comes with a file is run.

    Args:
        layer: A subclass of `CombinedLinear` with a name in `adapter` and a function `combine`, which is tried out on
            a few numbers here.

    Raises:
        TypeError: it is no such class.
        ValueError: the name is empty or that of a built-in variant, or `combine` is not what its docstring asks for.
    """
    if not (isinstance(layer, type) and issubclass(layer, CombinedLinear)):
        raise TypeError(f"layer={layer!r} must be a subclass of lightning_prune.perp.CombinedLinear")
    name = getattr(layer, "adapter", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{layer.__name__}.adapter={name!r} must be the name of the variant, such as 'signed'")
    if name in _BUILT_IN:
        raise ValueError(f"{layer.__name__}.adapter={name!r} is the name of a built-in variant; take another one")
    if layer.combine is CombinedLinear.combine:
        raise ValueError(f"{layer.__name__} must define combine(weight, product), see CombinedLinear.combine")
    _check_combine(layer)
    _VARIANTS[name] = layer


def variant_names() -> tuple[str, ...]:
    """All that are known."""
    return tuple(_VARIANTS)


def find_variant(adapter: object) -> type[SparseLinear]:
    """The layer class of a variant.

    Raises:
        ValueError: none of this name is known.
    """
    # A name from a damaged file may be anything, also what no dictionary takes as a key.
    found = _VARIANTS.get(adapter) if isinstance(adapter, str) else None
    if found is None:
        raise ValueError(
            f"adapter={adapter!r} must be one of {variant_names()}, or None for no adapters; one of your own has to be "
            "registered first (lightning_prune.perp.register_adapter)"
        )
    return found


def _check_combine(layer: type[CombinedLinear]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, product = torch.randn(2, 3, 4, generator=generator, device="cpu")  # [P, Q] each
    where, before = f"{layer.__name__}.combine(weight, product)", weight.clone()
    combined = layer.combine(weight, product.requires_grad_())
    if not isinstance(combined, torch.Tensor) or combined.shape != weight.shape or combined.dtype != weight.dtype:
        raise ValueError(f"{where} must return a tensor of the shape and dtype of weight")
    if not torch.equal(weight, before):
        raise ValueError(f"{where} changes weight in place, which is the model's; return a new tensor")
    if not combined.requires_grad:
        raise ValueError(f"{where} has no gradient by product, so that nothing would be trained")
    if not torch.allclose(layer.combine(weight[:1, :1], product[:1, :1]), combined[:1, :1]):
        raise ValueError(f"{where} must be element by element: its first number depends on others than the first two")
    starts_at_zero = layer.reset_lora_parameters is CombinedLinear.reset_lora_parameters
    if starts_at_zero and not torch.allclose(layer.combine(weight, torch.zeros_like(weight)), weight):
        raise ValueError(
            f"{where} must be weight where product is zero, as it is at the start; or override reset_lora_parameters, "
            "so that the adapter starts from the pruned model"
        )
