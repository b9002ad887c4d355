"""A run's folder as a Trainer leaves it, small, with hostile names, for the tests of the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from lightning_prune.history import HISTORY_FILE, append_step, begin_history
from lightning_prune.pruning.masks import pack_masks
from lightning_prune.pruning.score_histograms import ScoreSummary

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"&'"
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def matrices(blocks: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.{layer}.weight": torch.randn(48, 128, generator=generator)
        for i in range(blocks)
        for layer in LAYERS
    }


def prune(dense: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ScoreSummary]:
    """Half of every row goes; of up_proj whole columns."""
    masks, summary = {}, ScoreSummary()
    for name, weight in dense.items():
        score = weight.abs()
        if "up_proj" in name:
            score = torch.arange(128.0).expand(48, 128)
        masks[name] = score >= score.median(1, keepdim=True).values
        summary.add(name, score, masks[name], score.numel())
    return masks, summary


def write_run(folder: Path, dense: dict[str, torch.Tensor], hostile: str = "") -> Path:
    """``checkpoints/last.ckpt`` and what lies beside it; `hostile` goes wherever a name may stand."""
    (folder / "checkpoints").mkdir(parents=True)
    masks, summary = prune(dense)
    state = {f"model.{n}": w * masks[n] for n, w in dense.items()}
    state |= {"model.model.embed_tokens.weight": torch.randn(20, 128), "model.model.norm.weight": torch.ones(128)}
    if hostile:
        state[f"model.model.layers.0.{hostile}.weight"] = torch.eye(8)
    callback = {
        "version": 1,
        "score": f"gblm{hostile}",
        "pattern": "unstructured",
        "masks": pack_masks({f"model.{n}": m for n, m in masks.items()}),
        "scores": summary.state_dict(),
    }
    checkpoint = {
        "pytorch-lightning_version": f"2.6.6{hostile}",
        "epoch": 1,
        "global_step": 40,
        "state_dict": state,
        "callbacks": {"WeightPruning{}": callback},
        "hyper_parameters": {"config": {"model_type": "llama", "hidden_size": 128}, "learning_rate": 1e-4},
        "datamodule_hyper_parameters": {"source": f"wikitext{hostile}", "revision": "abc123", "block_size": 128},
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    (folder / "hparams.yaml").write_text(
        f"betas: !!python/tuple\n- 0.9\n- 0.95\nlearning_rate: 0.001\nmodel: {json.dumps('m' + hostile)}\n"
    )
    (folder / "metrics.csv").write_text(
        "epoch,step,train_loss,val_perplexity\n"
        + "".join(f"0,{s},{5 - s / 20},\n0,{s},,{90 - s}\n" for s in range(0, 41, 5))
    )
    settings = {"score": f"GBLM(alpha=100.0){hostile}", "sparsity": 0.5, "num_samples": 64}
    run: dict[str, Any] = {
        "versions": {"torch": "2.13.0", "evil" + hostile: hostile or "1"},
        "seed": 7,
        "precision": "32-true",
        "callbacks": [{"name": "WeightPruning" + hostile, "settings": settings}],
    }
    begin_history(folder / HISTORY_FILE, run, 0)
    for step in (0, 20, 40):
        layers = {n.removesuffix(".weight"): (48 * 128 * step // 80, 48 * 128, n.split(".")[-2]) for n in dense}
        append_step(folder / HISTORY_FILE, step, layers, {f"attention{hostile}": 0.5 + step, "ffn": 1.0})
    return folder


def write_results(file: Path, folder: str, hostile: str = "") -> Path:
    rows = [
        {"model": "dense", "zeros": "", "perplexity": 62.2, "sparsity": 0.0, "seconds": 100.0, "folder": "dense"},
        {"model": f"gblm{hostile}", "zeros": "50 %", "perplexity": 63.6, "sparsity": 0.5, "folder": folder},
    ]
    data = {"unigram_perplexity": 502.6, "models": rows, "settings": {"seed": 0, f"k{hostile}": hostile}}
    file.write_text(json.dumps(data))
    return file


class Page(HTMLParser):
    """Tags, references to other files, and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.styles = ""
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br", "path", "input"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset", "poster", "formaction"):
                self.references.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        elif data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.words)
