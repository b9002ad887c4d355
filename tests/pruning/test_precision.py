"""Under autocast every product of a hook is that of full precision: compared with float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruning_aware_models import batches, make_module, make_trainer
from tiny import make_llama, make_tokens
from torch import Tensor, nn

from lightning_prune import WeightPruning, prune
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.hessian import compensated, inverse_factor, prune_with_hessian
from lightning_prune.pruning.precision import full_precision
from lightning_prune.pruning.statistics import ALL_STATISTICS
from lightning_prune.pruning.targets import find_targets
from lightning_prune.structure.compensation import StreamedMoments
from lightning_prune.structure.saliency import StreamedKFAC
from lightning_prune.structure.units import read_structure

HALVES = [torch.bfloat16, torch.float16]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


class Seen:
    """Inputs and output gradients of a layer as its own hooks see them, in float64, one pair a pass."""

    def __init__(self, layer: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.deltas: list[Tensor] = []
        layer.register_forward_hook(self.take)

    def take(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(args[0].detach().double())
        if output.requires_grad:
            output.register_hook(lambda delta: self.deltas.append(delta.detach().double()))


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize(("half", "weights"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_statistics(half: torch.dtype, weights: torch.dtype, layer: str) -> None:
    model, ids = make_llama().to(weights), make_tokens(3, 24)
    seen = Seen(model.get_submodule(layer))
    statistics = collect(
        model,
        [{"input_ids": ids}],
        find_targets(model),
        ALL_STATISTICS,
        forward_context=lambda: torch.autocast("cpu", half),
        progress=False,
        num_samples=3,
    )[f"{layer}.weight"]
    x, delta = seen.inputs[-1], seen.deltas[-1]  # before it, the loss is tried on two of the samples
    gradients = delta.transpose(1, 2) @ x  # [B, O, I]
    assert statistics.hessian is not None
    assert statistics.hessian.dtype == torch.float32
    wanted = {
        "hessian": torch.einsum("bti,btj->ij", x, x) / 3,
        "input_norm": (x.square().sum((0, 1)) / 3).sqrt(),
        "output_grad_norm": (delta.square().sum((0, 1)) / 3).sqrt(),
        "gradient_l1": gradients.abs().sum(0),
        "gradient_l2": gradients.square().sum(0).sqrt(),
    }
    for name, value in wanted.items():
        assert relative(statistics.get(name), value) < 1e-5, name


@pytest.mark.parametrize("half", HALVES)
def test_streamed_moments_and_saliencies(half: torch.dtype) -> None:
    model, ids = make_llama(), make_tokens(2, 16)
    structure = read_structure(model)
    moments, kfac = StreamedMoments(structure, ["ffn"], 0.5), StreamedKFAC(structure, ["ffn"])
    down = model.model.layers[0].mlp.down_proj
    seen = Seen(down)
    for stream in (moments.stream, kfac.stream):
        stream.watch()
        stream.listening = True
    with torch.autocast("cpu", half):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        moments.end_step()
        kfac.add()
    x, delta = seen.inputs[0].flatten(0, 1), seen.deltas[0].flatten(0, 1)
    assert relative(moments.by_layer()["model.layers.0.mlp.down_proj"], x.t() @ x / len(x)) < 1e-6
    wanted = (delta.square().sum(0) @ down.weight.detach().double().square()) * x.square().sum(0)
    assert relative(kfac.sums("ffn")[0], wanted) < 1e-5


@pytest.mark.parametrize("half", HALVES)
def test_solvers_called_under_autocast(half: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(400, 32), torch.randn(16, 32)
    hessian, mask = x.t() @ x, torch.rand(16, 32) > 0.5
    calls: list[Callable[[], Any]] = [
        lambda: inverse_factor(hessian),
        lambda: prune_with_hessian(weight, hessian, mask=mask)[0],
        lambda: compensated(weight, hessian, torch.arange(8)),
    ]
    for call in calls:
        with torch.autocast("cpu", half):
            found = call()
        assert found.dtype == torch.float32
        assert torch.equal(found, call())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("options", [{"score": "sparsegpt"}, {"score": "wanda", "update": "obs", "sequential": True}])
def test_hessians_of_mixed_precision_can_be_solved(precision: str, options: dict[str, Any]) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    pruning = WeightPruning(**options, num_samples=16, progress=False)
    module = make_module()
    # On a CPU Lightning refuses float16 unless the plugin is given.
    plugin = MixedPrecision("bf16-mixed" if precision == "bf16-mixed" else "16-mixed", "cpu")
    make_trainer(pruning, plugins=[plugin], max_steps=2).fit(module, batches())
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)
    for name, mask in pruning.masks.items():
        assert not bool(module.get_parameter(name)[~mask].any())


def test_prune_within_autocast_solves_as_without() -> None:
    ids = {"input_ids": make_tokens(4, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        masks = prune(make_llama(), [ids], score="sparsegpt", progress=False, num_samples=4)
    assert sum(int((~m).sum()) for m in masks.values()) == sum(m.numel() for m in masks.values()) // 2


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_reduced_products_are_off_by_the_older_switch(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["high", "medium", "cuda", "none"])
def test_reduced_float32_products_are_off_inside_and_as_before_after(setting: str) -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    try:
        if setting in ("high", "medium"):
            torch.set_float32_matmul_precision(setting)
        elif setting == "cuda":
            cuda.fp32_precision = "tf32"
        before = cuda.fp32_precision, cpu.fp32_precision
        with torch.autocast("cpu", torch.bfloat16):
            with full_precision():
                assert cuda.fp32_precision in ("ieee", "none")
                assert cpu.fp32_precision in ("ieee", "none")
                assert not torch.is_autocast_enabled("cpu")
                if setting in ("high", "medium"):
                    assert torch.get_float32_matmul_precision() == "highest"  # the older switch can still be asked
            assert torch.is_autocast_enabled("cpu")
        assert (cuda.fp32_precision, cpu.fp32_precision) == before
        if setting in ("high", "medium"):
            assert torch.get_float32_matmul_precision() == setting
    finally:
        cuda.fp32_precision = cpu.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        cuda.fp32_precision = cpu.fp32_precision = "none"
