"""A small mixture of experts, trained here, and what pruning its experts costs.

Trains a Mixtral of a few million parameters on a text (once: the folder is used again), and prints tables:
perplexity after pruning weights, and after removing a quarter and half of the experts, by several scores and at
random; and time and memory of calibration, beside a dense model with as many weights.

    python tests/benchmarks/experts.py --folder FOLDER --train TEXT --calibration TEXT2 --evaluation TEXT3 \\
        --minutes 12 --threads 1 --json FILE
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from ours import ours_prune, ours_remove_experts
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

EXPERTS, WORDS, LENGTH = 8, 2048, 128
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "kfac": ("kfac", {}),
    "kfac-alps": ("kfac", {"update": "alps", "sequential": True}),
}
REMOVALS = ("random", "magnitude", "taylor2", "kfac", "reap")
KEY = ("model", "method", "what")


def train(folder: Path, text: Path, minutes: float) -> None:
    """Train the mixture for so many minutes, with the loss that balances its routers, and save it."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(text)], vocab_size=WORDS, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokens = common.tokenize(text, tokenizer)
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, intermediate_size=192, num_local_experts=EXPERTS, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.05, experts_implementation="grouped_mm",
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start, step, shown = time.perf_counter(), 0, 0.0
    while (spent := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:  # a short warm-up, then down in a straight line over the time there is
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * max(1 - spent, 0.05)
        first = torch.randint(len(tokens) - LENGTH, (8,))
        ids = torch.stack([tokens[i : i + LENGTH] for i in first])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if spent >= shown:
            print(f"step {step}, {spent:.0%} of the time: loss {loss.item():.3f}", flush=True)
            shown += 0.1
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dense_of(mixture: nn.Module) -> nn.Module:
    """An untrained dense model with as many weights: what its FFN has, the mixture's experts have together."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=192 * EXPERTS)).eval()


def measured(model: nn.Module, sequences: Tensor, method: str, pattern: str) -> dict[str, Any]:
    """Prune; seconds and memory above what was there."""
    score, options = METHODS[method]
    how = (score, 0.5, "unstructured" if pattern == "50" else pattern)
    with common.PeakMemory() as memory:
        start = time.perf_counter()
        masks = ours_prune(model, sequences, *how, 4, **options)
        seconds = time.perf_counter() - start
    if not common.same_zeros(model, masks):
        raise RuntimeError(f"{method}: a pruned weight is not zero")
    return {"seconds": seconds, "MiB above": (memory.peak - memory.start) / 2**20, "zeros": common.sparsity_of(masks)}


def usage(model: nn.Module, sequences: Tensor) -> str:
    """Least and largest share of tokens that an expert gets, over all layers; 1 / experts if all got as many."""
    shares: list[float] = []

    def see(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        counts = torch.bincount(output[2].reshape(-1), minlength=EXPERTS).float()
        shares.extend((counts / counts.sum()).tolist())

    handles = [layer.mlp.gate.register_forward_hook(see) for layer in model.model.layers]  # type: ignore[union-attr]
    with torch.no_grad():
        model(input_ids=sequences)
    for handle in handles:
        handle.remove()
    return f"{min(shares):.3f} to {max(shares):.3f}"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True, help="where the mixture is, or is to be")
    p.add_argument("--train", type=Path, help="text to train it on")
    p.add_argument("--minutes", type=float, default=12, help="how long to train it (default 12)")
    p.add_argument("--calibration", required=True, help="text file")
    p.add_argument("--evaluation", nargs="+", required=True, help="text files")
    p.add_argument("--samples", type=int, default=64, help="calibration sequences (default 64)")
    p.add_argument("--length", type=int, default=256, help="tokens of a calibration sequence (default 256)")
    p.add_argument("--windows", type=int, default=60, help="evaluation windows of each text (default 60)")
    p.add_argument("--window-length", type=int, default=256, help="tokens of a window (default 256)")
    p.add_argument("--draws", type=int, default=3, help="random removals (default 3)")
    p.add_argument("--only", choices=("weights", "experts"), help="what to prune (default: both, one after the other)")
    p.add_argument("--alone", nargs=2, metavar=("MODEL", "METHOD"), help="only time and memory of one, at 50 %%")
    p.add_argument("--threads", type=int, help="torch threads")
    p.add_argument("--json", type=Path, help="write the rows here; an existing file is added to")
    args = p.parse_args()
    if not (args.folder / "config.json").exists() and args.train is None:
        p.error(f"there is no model in {args.folder}: give --train TEXT")
    args.model, args.gguf_file = str(args.folder), None
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.folder / "config.json").exists():
        train(args.folder, args.train, args.minutes)
    model, tokenizer = common.load(args)
    sequences, evaluations = common.calibration_of(args, tokenizer), common.evaluations_of(args, tokenizer)
    rows, snapshot = common.Rows(args.json, KEY), common.Snapshot(model)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights:,} parameters; share of tokens of an expert: {usage(model, sequences[:16])}", flush=True)

    def add(method: str, what: str, measures: dict[str, Any]) -> None:
        row = {"model": "mixture", "method": method, "what": what}
        rows.add({**row, **measures, **common.perplexities(model, evaluations)})

    if args.alone:
        kind, method = args.alone
        measures = measured(model if kind == "mixture" else dense_of(model), sequences, method, "50")
        rows.add({"model": kind, "method": method, "what": "50, alone", **measures})
        return
    add("dense", "", {})
    for method in METHODS if args.only != "experts" else ():
        for pattern in ("50", "2:4"):
            snapshot.restore()
            add(method, pattern, measured(model, sequences, method, pattern))
        for kind in ("mixture", "dense"):  # in processes of their own: memory once had is not given back
            subprocess.run([sys.executable, *sys.argv, "--alone", kind, method], check=True)
    rows = common.Rows(args.json, KEY) if args.json else rows
    snapshot.restore()
    for keep in (EXPERTS * 3 // 4, EXPERTS // 2) if args.only != "weights" else ():
        for method in REMOVALS:
            draws = []
            for seed in range(args.draws if method == "random" else 1):
                smaller = copy.deepcopy(model)
                start = time.perf_counter()
                ours_remove_experts(smaller, sequences, keep, method, seed)
                draws.append({"seconds": time.perf_counter() - start, **common.perplexities(smaller, evaluations)})
            means = {name: statistics.mean(draw[name] for draw in draws) for name in draws[0]}
            spread = {} if len(draws) == 1 else {"± " + n: statistics.stdev(d[n] for d in draws) for n in evaluations}
            rows.add({"model": "mixture", "method": method, "what": f"{keep} of {EXPERTS} experts"} | means | spread)
    print(common.markdown(rows.rows))


if __name__ == "__main__":
    main()
