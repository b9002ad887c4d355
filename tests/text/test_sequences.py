"""Streamed blocks: nothing lost but the rest, different documents on every process and worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
from tiny import TINY

from lightning_prune import CausalLM, TextDataModule
from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.text.data import EMBEDDED
from lightning_prune.text.sequences import StreamedBlocks

CHAPTERS = EMBEDDED["austen"].read_text(encoding="utf-8").split("\n\nChapter ")[1:17]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Four files of four chapters each, and a tokenizer."""
    folder = tmp_path_factory.mktemp("stream")
    for i in range(4):
        lines = [json.dumps({"text": chapter[:3000]}) for chapter in CHAPTERS[4 * i : 4 * i + 4]]
        (folder / f"{i}.jsonl").write_text("\n".join([*lines, json.dumps({"text": " "})]), encoding="utf-8")
    tokenizer = trained_tokenizer([c[:3000] for c in CHAPTERS], 320, folder / "tokenizers")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, tokenizer


def documents(folder: Path) -> Any:
    files = sorted(str(path) for path in folder.glob("*.jsonl"))
    return datasets.load_dataset("json", data_files=files, split="train", streaming=True)


def found_in(blocks: StreamedBlocks, eos: int) -> list[list[int]]:
    """Documents, whole ones but for the last."""
    found: list[list[int]] = [[]]
    for block in blocks:
        assert len(block["input_ids"]) == blocks.block_size
        for token in block["input_ids"].tolist():
            if token == eos:
                found.append([])
            else:
                found[-1].append(token)
    return found


def test_blocks_are_the_documents_each_ended_less_the_rest(made: tuple[Path, Any]) -> None:
    folder, tokenizer = made
    expected = [tokenizer(c[:3000], add_special_tokens=False)["input_ids"] for c in CHAPTERS]
    found = found_in(StreamedBlocks(documents(folder), tokenizer, block_size=32), tokenizer.eos_token_id)
    assert all(document in expected for document in found[:-1])
    assert sum(map(len, expected)) + len(expected) - sum(map(len, found)) - len(found[:-1]) < 32
    assert found[:-1] != expected[: len(found) - 1]  # shuffled


def test_processes_see_different_documents_and_epochs_another_order(made: tuple[Path, Any]) -> None:
    folder, tokenizer = made
    shares = []
    for rank in range(2):
        blocks = StreamedBlocks(documents(folder), tokenizer, block_size=32, rank=rank, num_replicas=2)
        first = found_in(blocks, tokenizer.eos_token_id)
        blocks.set_epoch(1)
        second = found_in(blocks, tokenizer.eos_token_id)
        assert first[0] != second[0] or first[1] != second[1]
        shares.append({tuple(d) for d in first[:-1]})
    assert not shares[0] & shares[1]
    assert len(shares[0]) + len(shares[1]) >= 14


def test_a_stream_trains_a_model(made: tuple[Path, Any]) -> None:
    folder, _ = made
    data = TextDataModule(
        [str(path) for path in sorted(folder.glob("*.jsonl"))], tokenizer=str(folder / "tokenizer"), block_size=32,
        batch_size=2, streaming=True, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    module = CausalLM(config=TINY)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3
    assert data.val_dataloader() == []


def test_refused(made: tuple[Path, Any]) -> None:
    folder, _ = made
    with pytest.raises(ValueError, match="a stream is read once"):
        TextDataModule("austen", streaming=True)
    data = TextDataModule(
        str(folder / "0.jsonl"), tokenizer=str(folder / "tokenizer"), streaming=True, text_field="body"
    )
    with pytest.raises(ValueError, match="text_field='body' is not in"):
        data.setup("fit")
