"""Tiny models on disk for what measures models: a dense one, the same pruned, their tokenizer, text and pairs."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny import TINY
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_prune import prune
from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.text.data import EMBEDDED

PAIRS = [
    ("The teacher sees the children.", "The teacher see the children."),
    ("Two cats sleep.", "Two cats sleeps."),
    ("Anna hurt herself.", "Anna hurt themselves."),
    ("No student has ever lied.", "Some student has ever lied."),
    ("He said that she left.", "He said that her left."),
    ("This dog barks.", "These dog barks."),
    ("They were seen by Bob.", "They were saw by Bob."),
]


def write_pairs(path: Path, pairs=PAIRS) -> Path:
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": path.stem}) for good, bad in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def put_first(tokenizer, token: int):
    """Have a tokenizer put a token before every text, as Llama's and Gemma's do."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="begin $A", special_tokens=[("begin", token)]
    )
    return tokenizer


def make_models(folder: Path, begin: int | None = None) -> SimpleNamespace:
    """Folders ``dense`` and ``pruned`` (2:4), a text, and a folder ``pairs`` of two files.

    With `begin` the tokenizer puts that token before every text.
    """
    novel = EMBEDDED["austen"].read_text(encoding="utf-8")
    tokenizer = trained_tokenizer([novel[20_000:60_000]], 320, folder / "cache")
    if begin is not None:
        put_first(tokenizer, begin)
    text = folder / "text.txt"
    text.write_text(novel[60_000:64_000], encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "initializer_range": 0.2})).eval()
    for name in ("dense", "pruned"):
        if name == "pruned":
            prune(model, score="magnitude", pattern="2:4", progress=False)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pairs = folder / "pairs"
    pairs.mkdir()
    write_pairs(pairs / "agreement.jsonl", PAIRS[:4])
    write_pairs(pairs / "other.jsonl", PAIRS[4:])
    return SimpleNamespace(
        dense=folder / "dense", pruned=folder / "pruned", text=text, pairs=pairs, tokenizer=tokenizer, model=model
    )
