"""Run by test_progress in processes of its own: all that shows a progress bar, one after the other."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tiny import make_llama, make_tokens

from lightning_prune import Ranks, prune, prune_structured
from lightning_prune.checkpoints.export import export
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.evaluation.perplexity import perplexity
from lightning_prune.perp import reconstruct


def run(folder: Path) -> None:
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    transformers.logging.disable_progress_bar()  # which is its own affair
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    ranks = None
    if "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{folder.parent / 'store'}", rank=rank, world_size=size)
        ranks = Ranks(dist.group.WORLD)
    ids = make_tokens(4, 12)
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    dense = make_llama()
    smaller, model = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(copy.deepcopy(dense), batches, score="gblm", sparsity=0.5, num_samples=4, ranks=ranks)
    prune(copy.deepcopy(dense), batches, score="wanda", sparsity=0.5, num_samples=4, ranks=ranks)
    prune(model, batches, score="wanda", sparsity=0.5, num_samples=4, sequential=True, ranks=ranks)
    reconstruct(model, batches, dense, num_samples=4, steps=2, ranks=ranks)
    prune_structured(smaller, batches, target=0.9, types=("ffn",), num_samples=4)
    perplexity(model, ids.flatten(), seq_len=12, progress=True)
    if ranks is not None:  # in a group transformers lets the first rank alone write, and each has a folder of its own
        dist.destroy_process_group()
    model.save_pretrained(folder / "model")
    export(folder / "model", folder / "exported")
    inspect(folder / "exported")
