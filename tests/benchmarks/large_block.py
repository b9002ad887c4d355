"""One block of a large model: seconds and peak memory of pruning it, beside what `walk_memory` says.

The model has random weights, a small vocabulary, and two blocks whose weights wait in main memory: the second meets
what a block in the middle of the whole model meets. Times are of both blocks.

    python tests/benchmarks/large_block.py --shape llama-70b --updates none exact alps --samples 64 --length 2048
    python tests/benchmarks/large_block.py --shape tiny --samples 4 --length 16 --device cpu   # a dry run
"""

from __future__ import annotations

import argparse
import time

import torch
from accelerate import cpu_offload
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_prune import prune, walk_memory

SHAPES = {  # hidden, FFN, heads, heads of keys and values, blocks
    "llama-70b": (8192, 28672, 64, 8, 80),
    "llama-7b": (4096, 11008, 32, 32, 32),
    "tiny": (64, 96, 4, 2, 2),
}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-70b")
    parser.add_argument("--updates", nargs="+", default=["none", "exact", "alps"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    hidden, ffn, heads, kv_heads, blocks = SHAPES[args.shape]
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=2, vocab_size=1024, max_position_embeddings=args.length, tie_word_embeddings=False,
    )  # fmt: skip
    on_cuda = torch.device(args.device).type == "cuda"
    print(torch.cuda.get_device_name() if on_cuda else "CPU")
    print(
        f"| {args.shape}, {args.samples} x {args.length} | s a block | s of {blocks} | peak GiB | said |\n"
        "|---|---|---|---|---|"
    )
    for update in (None if name == "none" else name for name in args.updates):
        torch.manual_seed(0)
        with torch.device(args.device):  # random numbers for so many weights take a GPU
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        cpu_offload(model.cpu(), torch.device(args.device))
        batches = torch.randint(1024, (args.samples, args.length)).split(args.batch_size)
        said = walk_memory(model, update, num_samples=args.samples, length=args.length, batch_size=args.batch_size)
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        prune(model, batches, "wanda", update=update, sequential=True, num_samples=args.samples, progress=False)
        if on_cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / 2
        peak = torch.cuda.max_memory_allocated() / GIB if on_cuda else float("nan")
        print(f"| {update} | {seconds:.1f} | {seconds * blocks:.0f} | {peak:.2f} | {said} |")


if __name__ == "__main__":
    main()
