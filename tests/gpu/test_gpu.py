"""Every callback, `evaluate`, `benchmark` and `export` on one accelerator (see conftest.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pretend_device
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_prune import (
    CausalLM,
    CubicSchedule,
    PERPRetraining,
    PruningAwarePretraining,
    SparsityMonitor,
    TextDataModule,
    WeightPruning,
    benchmark,
    evaluate,
    export,
    perplexity,
    prune,
    prune_structured,
)
from lightning_prune.perp import reconstruct
from lightning_prune.structure import permute_channels, save_plain

ACCELERATOR = os.environ.get("GPU_TESTS_ON", "cuda")
ON_CPU = ACCELERATOR != "cuda"
PRETEND = ACCELERATOR == "pretend"
not_pretend = pytest.mark.skipif(PRETEND, reason="compiles for, or communicates on, a device that torch knows")
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", pytest.param("16-mixed", marks=pytest.mark.cuda_only)]
IDS = torch.randint(256, (64, 24), generator=torch.Generator().manual_seed(1))


def make_model() -> Any:
    size = 64 if ON_CPU else 256
    config = LlamaConfig(
        hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=256, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Module(L.LightningModule):
    def __init__(self, optimizer: str = "fused", shards: bool = False) -> None:
        super().__init__()
        self.model, self.optimizer, self.shards = make_model(), optimizer, shards

    def configure_model(self) -> None:
        if self.shards:
            mesh, self.shards = self.device_mesh["data_parallel"], False
            for part in (*self.model.model.layers, self.model):
                fully_shard(part, mesh=mesh)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True)
        if self.optimizer == "muon":
            return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-3)
        return torch.optim.AdamW(parameters, lr=1e-3, **{self.optimizer: True})


class Holds(L.Callback):
    """After every batch no pruned weight is anything but zero."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pruner = next(c for c in trainer.callbacks if isinstance(c, WeightPruning))
        for name, mask in pruner.masks.items():
            weight = pl_module.get_parameter(name).detach()
            weight, mask = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in (weight, mask))
            assert not bool((weight[~mask.to(weight.device)] != 0).any()), name


def placed(**options: Any) -> dict[str, Any]:
    """Arguments of a Trainer on the device."""
    return pretend_device.placed(**options) if PRETEND else {"accelerator": ACCELERATOR, "devices": 1, **options}


def fit(
    module: L.LightningModule,
    *callbacks: L.Callback,
    steps: int = 3,
    ckpt: Any = None,
    ids: Tensor = IDS,
    **options: Any,
) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_steps=steps, enable_checkpointing=False, callbacks=list(callbacks), **quiet, **placed(**options)
    )
    trainer.fit(module, DataLoader(ids, batch_size=8), ckpt_path=ckpt)
    return trainer


def pruned_fit(module: Any = None, score: str = "wanda", trainer: Any = None, **options: Any) -> WeightPruning:
    module = Module() if module is None else module
    pruning = WeightPruning(score=score, num_samples=16, progress=False, **options)
    fit(module, pruning, Holds(), **(trainer or {}))
    assert pruning.sparsity == pytest.approx(0.5, abs=5e-3)
    if not any(hasattr(mask, "full_tensor") for mask in pruning.masks.values()):
        assert all(mask.device.type == "cpu" for mask in pruning.masks.values())
        weights = dict(module.named_parameters())
        assert not any(bool(weights[n].detach().cpu()[~mask].any()) for n, mask in pruning.masks.items())
    return pruning


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("score", ["magnitude", "wanda", "gblm", "kfac", "sparsegpt"])
def test_scores(score: str, precision: str) -> None:
    pruned_fit(score=score, trainer={"precision": precision})


@pytest.mark.parametrize(
    "optimizer", ["foreach", pytest.param("capturable", marks=pytest.mark.cuda_only), "sgd", "muon"]
)
def test_optimizers(optimizer: str) -> None:
    pruned_fit(Module(optimizer))


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4", "update": "obs", "sequential": True},
        {"score": "gblm", "group": "global"},
        {"allocation": "owl"},
        {"score": "gblm", "gradient_device": "cpu"},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    pruned_fit(**options)


def test_schedule_and_monitor(tmp_path: Path) -> None:
    pruning = WeightPruning(score="gblm", num_samples=16, schedule=CubicSchedule(1, 5, 1), progress=False)
    fit(Module(), pruning, Holds(), SparsityMonitor(1), steps=7, default_root_dir=tmp_path)
    assert pruning.sparsity == pytest.approx(0.5, abs=5e-3)


@not_pretend
@pytest.mark.cuda_only
def test_inductor() -> None:
    module = Module()
    module.model.forward = torch.compile(module.model.forward)
    pruned_fit(module, score="kfac", trainer={"precision": "bf16-mixed"})


@not_pretend
@pytest.mark.parametrize("score", ["gblm", "kfac"])
def test_ddp(score: str) -> None:
    pruned_fit(score=score, trainer={"strategy": "ddp"})


@not_pretend
@pytest.mark.parametrize(("score", "update"), [("gblm", None), ("kfac", "obs")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fsdp2(score: str, update: str | None, precision: str) -> None:
    backend = {"process_group_backend": "gloo"} if ON_CPU else {}
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, **backend)
    module = Module("foreach", shards=True)
    pruned_fit(module, score=score, update=update, trainer={"strategy": strategy, "precision": precision})


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    same = IDS[:8].repeat(8, 1)  # whatever batch a resumed run begins with

    def run(steps: int, ckpt: Any = None) -> tuple[Module, L.Trainer]:
        module = Module()
        pruning = WeightPruning(score="wanda", num_samples=16, progress=False)
        return module, fit(module, pruning, steps=steps, ckpt=ckpt, precision="bf16-mixed", ids=same)

    whole, _ = run(8)
    run(4)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(8, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    torch.load(tmp_path / "half.ckpt", weights_only=True)


@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "hira", "lora_prune", None])
def test_adapters(adapter: str | None) -> None:
    module = Module()
    pruning = WeightPruning(score="kfac", num_samples=16, progress=False)
    fit(module, pruning, PERPRetraining(adapter=adapter), precision="bf16-mixed")
    assert type(module.model) is LlamaForCausalLM
    assert not any(bool(module.get_parameter(n).detach().cpu()[~mask].any()) for n, mask in pruning.masks.items())


@pytest.mark.parametrize("options", [{"steps": 5}, {"train": "all"}], ids=str)
def test_reconstruction(options: dict[str, Any]) -> None:
    module, perp = Module(), PERPRetraining(reconstruct={**options, "num_samples": 16})
    fit(module, WeightPruning(score="wanda", num_samples=16, progress=False), perp, precision="bf16-mixed")
    assert perp.reconstruction is not None
    assert perp.reconstruction.after <= perp.reconstruction.before


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("saliency", ["taylor2", "kfac"])
def test_shrinking(saliency: str, second_order: bool, tmp_path: Path) -> None:
    module = Module()
    before = sum(p.numel() for p in module.parameters())
    shrinking = PruningAwarePretraining(0.7, end=8, saliency=saliency, second_order=second_order, compact_every=4)
    fit(module, shrinking, steps=10, precision="bf16-mixed")
    assert sum(p.numel() for p in module.parameters()) <= 0.7 * before
    save_plain(module.model, tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), IDS[:2]
    torch.testing.assert_close(loaded(ids).logits, module.model.cpu()(ids).logits, atol=1e-2, rtol=0)


def test_distillation() -> None:
    fit(Module(), PruningAwarePretraining(0.8, end=4, distill_from=make_model()), steps=6, precision="bf16-mixed")


@pytest.mark.parametrize("how", [{}, {"saliency": "obs", "types": ("attention", "ffn"), "rounds": 2}])
def test_prune_structured(how: dict[str, Any]) -> None:
    model = make_model().to(ACCELERATOR)
    batch = {"input_ids": IDS[:16].to(ACCELERATOR), "labels": IDS[:16].to(ACCELERATOR)}
    prune_structured(model, [batch], target=0.8, **how)
    assert model(input_ids=batch["input_ids"]).logits.isfinite().all()


def test_channels_in_another_order() -> None:
    model = make_model().to(ACCELERATOR).double()
    before = model(IDS[:2].to(ACCELERATOR)).logits
    permute_channels(model, [IDS[:16]], num_samples=16, progress=False)
    torch.testing.assert_close(model(IDS[:2].to(ACCELERATOR)).logits, before, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_the_device_is_exported_and_evaluated(tmp_path: Path) -> None:
    """`fit`, `export`, `evaluate`: the zeros of the device's weights are in the folder, and it is measured there."""
    text = tmp_path / "text.txt"
    text.write_text("it is a truth universally acknowledged. " * 400, encoding="utf-8")
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    data = TextDataModule(str(text), vocab_size=300, block_size=32, batch_size=4, cache_dir=str(tmp_path / "cache"))
    module, pruning = CausalLM(config=config), WeightPruning(score="kfac", num_samples=8, progress=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_steps=2, callbacks=[pruning], enable_checkpointing=False, limit_val_batches=0, **quiet, **placed()
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    inspection = export(tmp_path / "last.ckpt", tmp_path / "model", progress=False)
    assert inspection.sparsity == pytest.approx(pruning.sparsity)
    results = evaluate(tmp_path / "model", [text], seq_len=32, max_windows=4, device=ACCELERATOR, progress=False)
    on_cpu = evaluate(tmp_path / "model", [text], seq_len=32, max_windows=4, device="cpu", progress=False)
    measured = [r.models[0].texts[0].perplexity for r in (results, on_cpu)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)


def test_evaluate_and_benchmark(tmp_path: Path) -> None:
    model = make_model().to(ACCELERATOR)
    prune(model, [{"input_ids": IDS[:8]}], score="wanda", pattern="2:4", num_samples=8, progress=False)
    assert perplexity(model, IDS.flatten(), seq_len=24).tokens > 0
    model.save_pretrained(tmp_path)
    found = benchmark(
        tmp_path, prompt_tokens=8, new_tokens=2, repeats=2, warmup=1, device=ACCELERATOR, progress=False,
        dtype="bfloat16",
    )  # fmt: skip
    assert len(found.models) == (1 if ON_CPU else 2)  # on CUDA semi-structured tensors too


@pytest.mark.cuda_only
def test_semi_structured_tensors_compute_what_the_dense_do() -> None:
    from torch.sparse import to_sparse_semi_structured

    layer = nn.Linear(256, 256, bias=False, dtype=torch.float16, device="cuda")
    prune(nn.Sequential(layer), score="magnitude", pattern="2:4", progress=False)
    x = torch.randn(64, 256, dtype=torch.float16, device="cuda")
    dense = layer(x)
    layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight))
    torch.testing.assert_close(layer(x), dense, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("what", ["random", "structured", "reconstruct", "fit"])
def test_default_device(what: str) -> None:
    """With the default device that notebooks set, everything is as without it."""
    found, batches = [], [{"input_ids": IDS[:8].to(ACCELERATOR)}]
    for default in (torch.device("cpu"), torch.device(ACCELERATOR)):
        module = Module()
        dense, model = make_model().to(ACCELERATOR), module.model.to(ACCELERATOR)
        with default:
            if what == "structured":
                prune_structured(model, batches, target=0.8, progress=False)
            elif what == "fit":
                fit(module, WeightPruning(score="wanda", num_samples=8, progress=False))
            else:
                prune(model, score="random", progress=False)
            if what == "reconstruct":
                reconstruct(model, batches, dense, steps=2, progress=False)
        found.append(model.cpu().state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, msg=lambda text, name=name: f"{name}: {text}")
