"""Every block of code in the documentation runs; every command of it is one that exists."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny import make_tokens
from torch.utils.data import DataLoader

import lightning_prune
import lightning_prune.perp
import lightning_prune.report
import lightning_prune.structure
from lightning_prune import CausalLM, WeightPruning
from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.cli import COMMANDS, TRAINER_COMMANDS, parser_of
from lightning_prune.text.data import EMBEDDED

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "notebooks" / "docs"
PAGES = sorted((DOCS / "pages").rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Pages whose code is of a part that may be absent.
NEEDS = {"efficientllm": "lightning_prune/callbacks/pruning_aware_pretraining.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(DOCS / "pages" if path in PAGES else ROOT))


def is_complete(path: Path) -> bool:
    return (ROOT / NEEDS.get(path.stem, "")).exists()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer in place of the one on the hub, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("hub")
    text = EMBEDDED["austen"].read_text(encoding="utf-8")[:60_000]
    (folder / "train.txt").write_text(text, encoding="utf-8")
    L.seed_everything(0, verbose=False)
    module = CausalLM(config=CONFIG)
    module.model.save_pretrained(folder / "model")
    trained_tokenizer([text], 300, folder / "tokenizers").save_pretrained(folder / "model")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"input_ids": row} for row in make_tokens(4, 16, 300)]))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder


@pytest.fixture
def namespace(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take as given: your model, module and data; a Trainer that makes two steps on one CPU."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "last.ckpt"):
        (tmp_path / name).write_bytes((hub / name).read_bytes())

    class ShortTrainer(L.Trainer):
        def __init__(self, **settings: Any) -> None:
            fixed = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_steps": 2, "limit_val_batches": 1}
            quiet = {"enable_progress_bar": False, "enable_model_summary": False}
            super().__init__(**{**settings, **fixed, **quiet})

    monkeypatch.setattr(L, "Trainer", ShortTrainer)
    monkeypatch.setitem(EMBEDDED, "austen", hub / "train.txt")
    # Calibration on the pages' 128 samples would only take longer. The class itself is patched: a subclass of its
    # name would outlive this test, and make the name ambiguous in the YAML that other tests read.
    with_all_samples = WeightPruning.__init__
    monkeypatch.setattr(
        WeightPruning, "__init__", lambda self, *a, **k: with_all_samples(self, *a, **{**k, "num_samples": 4})
    )
    L.seed_everything(0, verbose=False)
    module = CausalLM(config=CONFIG)
    rows = [{"input_ids": row} for row in make_tokens(8, 24, 300)]
    return {
        "module": module,
        "model": module.model,
        "data": DataLoader(rows, batch_size=4),
        "batches": [{"input_ids": make_tokens(4, 24, 300, seed=s)} for s in range(2)],
        "optimizer": torch.optim.AdamW(module.model.parameters(), lr=1e-3),
    }


@pytest.mark.few_fast(10)
@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_code_runs(path: Path, hub: Path, namespace: dict[str, Any], tmp_path: Path) -> None:
    if not is_complete(path):
        pytest.skip(f"{NEEDS[path.stem]} is not there")
    if path.stem == "monitor":
        namespace["module"].save_pretrained(tmp_path / "pruned")
    for number, block in enumerate(blocks(path, "python"), 1):
        code = compile(block.replace(HUB_MODEL, str(hub / "model")), f"{name_of(path)}, block {number}", "exec")
        exec(code, namespace)


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_commands_exist(path: Path) -> None:
    for block in blocks(path, "bash"):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if not words or words[0] != "lightning-prune":
                continue
            assert words[1] in (*COMMANDS, *TRAINER_COMMANDS), line
            if words[1] in COMMANDS:
                parser_of(words[1]).parse_args(words[2:])
            else:
                assert (ROOT / words[words.index("--config") + 1]).is_file(), line


def test_pages_are_in_the_order_of_the_house() -> None:
    """One sentence, function, Trainer, hyper-parameters, details, limits, source."""
    order = ["As a function", "In a Trainer", "Hyper-parameters", "Details", "Limits", "Source"]
    questions = ("why", "comparison", "how_it_works", "figures", "limits", "glossary")
    project = ("versions", "changelog", "security")
    methods = [p for p in PAGES if p.stem not in ("index", "tour", "cli", "api", *questions, *project)]
    assert len(methods) >= 11
    for path in methods:
        headings = re.findall(r"^## (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert [h for h in headings if h in order] == order, name_of(path)


def test_what_the_package_offers_is_on_the_api_page() -> None:
    api = (DOCS / "pages" / "api.md").read_text(encoding="utf-8")
    targets = re.findall(r"^::: ([\w.]+)$", api, re.MULTILINE)
    named = {target.rpartition(".")[2] for target in targets}
    for package in (lightning_prune, lightning_prune.perp, lightning_prune.report, lightning_prune.structure):
        for name in package.__all__:  # as it is imported
            assert {f"{package.__name__}.{name}", f"lightning_prune.{name}"} & {*targets}, f"{package.__name__}.{name}"
    for target in targets:
        module, _, name = target.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        if inspect.isfunction(found):  # what it returns is used by its members
            for word in re.findall(r"\w+", str(inspect.signature(found).return_annotation)):
                home = str(getattr(found.__globals__.get(word), "__module__", ""))
                assert not home.startswith("lightning_prune.") or word in named, f"{word}, of {target}"


def test_files_named_in_the_pages_exist() -> None:
    for path in PAGES:
        for name in re.findall(r"`((?:lightning_prune|recipes|notebooks|tests)/[\w./]*)`", path.read_text("utf-8")):
            if is_complete(path):
                assert (ROOT / name).exists(), f"{name_of(path)}: {name}"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "mkdocstrings", "material")),
    reason="the extra 'docs' is not installed",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "index.html").is_file()
