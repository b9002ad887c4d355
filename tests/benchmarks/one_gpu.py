"""Every figure that a GPU is needed for, in one run: both sides of each ratio, with peak memory, on Llama-2-7B's shape.

    python tests/benchmarks/one_gpu.py --json gpu.json                       # 8 minutes at most, 80 GB
    python tests/benchmarks/one_gpu.py --device cpu --scale 64 --json dry.json  # tries the script itself

Weights are random, in bfloat16. Parts run in the order of `PARTS` until `--budget` seconds are over; what was left out,
or failed, is in the file too, with the card and the versions.

- scoring: Wanda, GBLM and kfac (masks made, weights as they were) against a bare forward, forward with full backward,
  and forward with backward of activations alone; peaks above the model.
- masks: a training step with and without masks, in turns; bytes of the masks.
- perp: MaskLoRA against plain LoRA, a step each, in turns.
- selection: masks of every layer, in layers, in rows, and 2:4, in seconds for the whole model.
- alps: kfac-ALPS of the first layers, and what that makes for the whole model.
- sparse24: a step with fixed 2:4 masks, dense products against semi-structured ones, weights packed after each step;
  first the outputs and gradients of both are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class Bench:
    """Shapes, the device, and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, scale = args, torch.device(args.device), args.scale
        self.end = time.monotonic() + args.budget
        self.layers, self.length = max(32 // scale, 2), 2048 // scale
        self.training_layers, self.alps_layers = max(8 // scale, 2), max(4 // scale, 1)
        heads = max(32 // scale, 2)
        self.sizes = {
            "hidden_size": 4096 // scale, "intermediate_size": 11008 // scale // 4 * 4, "num_attention_heads": heads,
            "num_key_value_heads": heads, "vocab_size": 32000 // scale, "max_position_embeddings": 4096,
        }  # fmt: skip
        self.rows: dict[str, Any] = {"card": self._card(), "torch": torch.__version__, "scale": scale}

    def _card(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

    def model(self, layers: int) -> LlamaForCausalLM:
        """Random weights of the shape."""
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                return LlamaForCausalLM(LlamaConfig(**self.sizes, num_hidden_layers=layers)).eval()
        finally:
            torch.set_default_dtype(default)

    def batches(self) -> list[dict[str, Tensor]]:
        ids = torch.randint(self.sizes["vocab_size"], (self.args.samples, self.length)).to(self.device)
        return [{"input_ids": part, "labels": part} for part in ids.split(4)]

    def timed(self, function: Callable[[], Any]) -> dict[str, float]:
        """Seconds, and GiB above what was there."""
        gc.collect()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"s": seconds, "GiB": (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0}

    def sides(self, functions: dict[str, Callable[[], Any]], rounds: int, base: str, warmup: int = 1) -> dict[str, Any]:
        """Medians of each side, run in turns, and the ratio to one of them within rounds."""
        found: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
        for turn in range(warmup + rounds):
            for name in functions if turn % 2 else reversed(functions):
                figures = self.timed(functions[name])
                if turn >= warmup:
                    found[name].append(figures)
        result: dict[str, Any] = {}
        for name, figures in found.items():
            ratios = [a["s"] / b["s"] for a, b in zip(figures, found[base], strict=True)]
            result[name] = {"s": statistics.median(f["s"] for f in figures), "GiB": max(f["GiB"] for f in figures)}
            result[name] |= {"ratio": statistics.median(ratios), "rounds": len(ratios)}
        return result


def scoring(bench: Bench) -> dict[str, Any]:
    from lightning_prune.pruning.pipeline import run_plan
    from lightning_prune.pruning.plan import make_plan
    from lightning_prune.pruning.settings import PruningSettings, make_score

    model, batches = bench.model(bench.layers), bench.batches()

    def score(name: str) -> None:
        plan = make_plan(model, PruningSettings(make_score(name), num_samples=bench.args.samples, progress=False))
        run_plan(plan, model, batches, apply=False)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model.model(input_ids=batch["input_ids"], use_cache=False)

    def backward(weights: bool) -> None:
        model.requires_grad_(weights)
        first = model.model.layers[0].input_layernorm.weight
        first.requires_grad_(True)
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
            for parameter in model.parameters():
                parameter.grad = None
        model.requires_grad_(True)

    pairs: dict[str, Callable[[], None]] = {
        "wanda": forward, "kfac": lambda: backward(False), "gblm": lambda: backward(True)
    }  # fmt: skip
    result = {"parameters": sum(p.numel() for p in model.parameters()), "samples": bench.args.samples}
    for name, bare in pairs.items():
        result[name] = bench.sides({"ours": lambda name=name: score(name), "bare": bare}, 2, "bare", warmup=0)
    return result


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def masks(bench: Bench) -> dict[str, Any]:
    from lightning_prune import prune
    from lightning_prune.pruning.holding import MaskHold

    model, ids = bench.model(bench.training_layers).train(), bench.batches()[0]["input_ids"]
    found, optimizer = prune(model, score="magnitude", progress=False), _optimizer(model)
    hold: list[MaskHold] = []
    bytes_before = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0

    def masked(hook: bool) -> None:
        hold.append(MaskHold(model, found, hook_gradients=hook))
        hold[-1].watch([optimizer])
        held = torch.cuda.memory_allocated() - bytes_before if bench.device.type == "cuda" else 0
        result["bytes a weight"] = held / sum(mask.numel() for mask in found.values())

    def steps(kind: str) -> Callable[[], float]:
        def run() -> None:
            for _ in range(bench.args.steps):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                if kind == "at once":  # as WeightPruning does
                    hold[-1].mask_gradients()
                optimizer.step()
                optimizer.zero_grad()

        def measured() -> float:
            if kind != "none":
                masked(hook=kind == "hooks")
            seconds = bench.timed(run)["s"]
            if kind != "none":
                hold.pop().remove()
            return seconds

        return measured

    result: dict[str, Any] = {}
    seconds = common.interleaved({k: steps(k) for k in ("none", "at once", "hooks")}, bench.args.rounds)
    for kind in ("at once", "hooks"):
        pairs = list(zip(seconds[kind], seconds["none"], strict=True))
        result[kind] = {"ms a step": 1e3 * statistics.median(seconds[kind]) / bench.args.steps}
        result[kind] |= common.paired_overhead(pairs)
    return result


def perp(bench: Bench) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    from lightning_prune import prune
    from lightning_prune.perp import add_adapters

    ids = bench.batches()[0]["input_ids"]
    plain, ours = bench.model(bench.training_layers).train(), bench.model(bench.training_layers).train()
    lora = get_peft_model(plain, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    found = prune(ours, score="magnitude", progress=False)
    adapted = add_adapters(ours, "mask_lora", masks=found, r=16)
    models: dict[str, Any] = {"lora": lora, "mask_lora": adapted if isinstance(adapted, nn.Module) else ours}
    optimizers = {name: _optimizer(model) for name, model in models.items()}

    def steps(name: str) -> None:
        for _ in range(bench.args.steps):
            _step(models[name], optimizers[name], ids)

    return bench.sides({n: lambda n=n: steps(n) for n in models}, bench.args.rounds, "lora")


def selection(bench: Bench) -> dict[str, Any]:
    from lightning_prune.pruning.patterns import NM, lowest_in_layer, lowest_in_rows, nm_mask

    hidden, inner = bench.sizes["hidden_size"], bench.sizes["intermediate_size"]
    shapes = {(hidden, hidden): 4, (inner, hidden): 2, (hidden, inner): 1}  # a block's layers
    result: dict[str, Any] = {}
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "layers": lambda s: lowest_in_layer(s, s.numel() // 2),
        "rows": lambda s: lowest_in_rows(s, s.numel() // 2),
        "2:4": lambda s: nm_mask(s, NM(2, 4)),
    }
    for name, way in ways.items():
        total = 0.0
        for shape, number in shapes.items():
            scores = torch.rand(shape, device=bench.device)
            way(scores)
            seconds = [bench.timed(lambda way=way, scores=scores: way(scores))["s"] for _ in range(3)]
            total += number * bench.layers * statistics.median(seconds)
        result[name] = {"s, whole model": total}
    return result


def alps(bench: Bench) -> dict[str, Any]:
    from lightning_prune import prune

    model = bench.model(bench.alps_layers)
    data = bench.batches()
    figures = bench.timed(
        lambda: prune(
            model, data, score="kfac", update="alps", sequential=True, num_samples=bench.args.samples, progress=False
        )
    )
    return figures | {"layers": bench.alps_layers, "s, whole model": figures["s"] * bench.layers / bench.alps_layers}


class _SparseProduct(torch.autograd.Function):
    """``x W^T`` by the packed weight; the backward products are dense, since W^T is not 2:4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].t() @ x, None


class SparseLinear(nn.Module):
    """A linear layer without bias whose forward product is semi-structured."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Take the weight's values; on a CPU, which cannot pack, as they are."""
        weight = self.weight.detach()
        self.packed = torch.sparse.to_sparse_semi_structured(weight) if weight.is_cuda else weight

    def forward(self, x: Tensor) -> Tensor:
        return _SparseProduct.apply(x.flatten(0, -2), self.weight, self.packed).unflatten(0, x.shape[:-1])


def sparse24(bench: Bench) -> dict[str, Any]:
    from lightning_prune import hold_masks, prune

    ids = bench.batches()[0]["input_ids"]
    models = {name: bench.model(bench.training_layers).train() for name in ("dense products", "semi-structured")}
    for name, model in models.items():
        found = prune(model, score="magnitude", pattern="2:4", progress=False)
        optimizer = _optimizer(model)
        hold_masks(model, found, optimizer)
        models[name].optimizer = optimizer
    sparse: list[SparseLinear] = []
    for block in models["semi-structured"].model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, SparseLinear(layer))
                    sparse.append(getattr(part, name))

    def run(name: str) -> None:
        for _ in range(bench.args.steps):
            _step(models[name], models[name].optimizer, ids)
            if name == "semi-structured":
                for layer in sparse:
                    layer.pack()

    layer = models["dense products"].model.layers[0].mlp.up_proj
    x = torch.randn(64, layer.in_features, dtype=torch.bfloat16, device=bench.device)
    results = []
    for product in (layer, sparse[5]):  # q, k, v, o, gate, up
        inputs = x.clone().requires_grad_(True)
        output = product(inputs)
        output.backward(torch.ones_like(output))
        results.append((output.detach(), inputs.grad, product.weight.grad.clone()))
        product.weight.grad = None
    for dense, other in zip(*results, strict=True):
        torch.testing.assert_close(other, dense, rtol=2e-2, atol=2e-2)
    return bench.sides({n: lambda n=n: run(n) for n in models}, bench.args.rounds, "semi-structured")


PARTS = {
    "scoring": scoring,
    "masks": masks,
    "selection": selection,
    "sparse24": sparse24,
    "perp": perp,
    "alps": alps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes by this (default 1)")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences (default 64)")
    parser.add_argument("--steps", type=int, default=5, help="training steps timed together (default 5)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the training parts (default 5)")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no part begins (default 450)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    for name in args.only:
        start = time.monotonic()
        if start > bench.end:
            bench.rows[name] = "left out: the budget was over"
        else:
            try:
                bench.rows[name] = PARTS[name](bench)
            except Exception as error:  # the others are wanted all the same
                bench.rows[name] = f"failed: {type(error).__name__}: {error}"
            bench.rows[name + ", s"] = round(time.monotonic() - start, 1)
        gc.collect()
        args.json.write_text(json.dumps(bench.rows, indent=1))
        print(name, json.dumps(bench.rows[name]), flush=True)


if __name__ == "__main__":
    main()
