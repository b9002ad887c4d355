"""Every command answers a damaged file or an odd number with status 2 and one line, never with a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from fit_configs import fit_config
from tiny import TINY, make_tokens
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, TextDataModule, WeightPruning
from lightning_prune.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("damaged"),  # one process makes the files for all
]

DEEP = "[" * 100_000
HUGE = 10**30


def trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "t.txt").write_text("some text here, and more of it. " * 300)
    data = TextDataModule(folder / "t.txt", vocab_size=320, block_size=16, cache_dir=str(folder / "cache"))
    module = CausalLM(config=TINY, lr_schedule="constant")
    module.tokenizer = data.tokenizer
    fit = trainer(folder, WeightPruning(score="magnitude", progress=False))
    fit.fit(module, DataLoader([{"input_ids": row} for row in make_tokens(4, 8)]))
    fit.save_checkpoint(folder / "a.ckpt")
    module.save_pretrained(folder / "model")
    module.model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    rows = [{"query": "some", "choices": [" text", " more"], "gold": 0}]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [{"model": "a", "perplexity": 3.0, "texts": [], "tasks": []}]
    (folder / "results.json").write_text(json.dumps({"models": models, "settings": {}, "versions": {}}))
    assert main(["export", str(folder / "a.ckpt"), str(folder / "exported"), "--tokenizer", "none"]) == 0
    return folder


def answer(args: list[Any]) -> tuple[int, str]:
    """Status and lines of a command; an exception that comes out is a traceback."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(arg) for arg in args])
    return status, "".join(line for line in err.getvalue().splitlines(True) if "lightning-prune: error:" in line)


def refused(args: list[Any], name: str = "") -> None:
    """Status 2 and one line, which names the file."""
    status, error = answer(args)
    assert status == 2, (args, status)
    assert error.count("\n") == 1, (args, error)
    assert name in error, (args, error)


def survived(args: list[Any]) -> None:
    """Harmless (0), noticed (1), or refused with one line (2)."""
    status, error = answer(args)
    assert status in (0, 1, 2), (args, status)
    assert error.count("\n") == (status == 2), (args, error)


def no_file(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(share: float) -> Any:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(share: float) -> Any:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(len(data) - 1, int(len(data) * share))] ^= 0xFF
        path.write_bytes(data)

    return damage


def write(content: str | bytes) -> Any:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


BINARY = {
    "empty": write(b""), "cut at 1 %": cut(0.01), "cut at half": cut(0.5), "cut at 99 %": cut(0.99),
    "first byte": flip(0), "half": flip(0.5), "last byte": flip(1), "text": write("hello"), "folder": a_folder,
    "dangling": no_file, "deep": write(DEEP), "nul": write(b"\0" * 1000),
}  # fmt: skip
TEXTS = {
    "empty": write(b""), "cut at half": cut(0.5), "deep": write(DEEP), "not UTF-8": write(b'{"a": "\xff\xfe"}'),
    "list": write("[1]"), "null": write("null"), "number": write("1e999"), "folder": a_folder, "dangling": no_file,
    "large number": write("9" * 5000), "nul": write(b"\0" * 1000),
}  # fmt: skip


HEAVY = ("cut at half", "deep")
"""Damage that is also shown to the commands that take seconds: they read by the same functions."""


def commands(folder: Path, kind: str, heavy: bool) -> list[list[Any]]:
    """What reads a file of a kind."""
    where = folder / kind.split("/")[0]
    light = [["inspect", where], ["export", where, folder / "out"], ["report", where, "-o", folder / "r.html"]]
    slow: list[list[Any]] = [["evaluate", where, "--text", folder / "t.txt", "--max_windows", "1"]]
    if kind == "a.ckpt":
        light.append(["export", where, folder / "m.safetensors", "--masks_only"])
        slow.append(["fit", "--config", fit_config(folder), "--ckpt_path", where])
    else:
        slow.append(["fit", "--config", fit_config(folder, model={"model": str(where), "config": None})])
    return light + slow if heavy else light


@pytest.fixture
def copy(files: Path, tmp_path: Path) -> Path:
    shutil.copytree(files, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    (tmp_path / "copy" / "cache").symlink_to(files / "cache")
    return tmp_path / "copy"


@pytest.mark.few_fast(9)
@pytest.mark.parametrize("damage", BINARY)
@pytest.mark.parametrize("kind", ["a.ckpt", "model/model.safetensors", "exported/model.safetensors"])
def test_weights(kind, damage, copy):
    BINARY[damage](copy / kind)
    for args in commands(copy, kind, damage in HEAVY):
        survived(args)
        if damage not in ("half", "last byte"):  # one weight, of which safetensors of others have no check sum
            refused(args)


@pytest.mark.few_fast(12)
@pytest.mark.parametrize("damage", TEXTS)
@pytest.mark.parametrize(
    "kind",
    ["model/config.json", "model/tokenizer.json", "sharded/model.safetensors.index.json", "exported/sparsity.json"],
)  # fmt: skip
def test_small_files_of_a_model(kind, damage, copy):
    TEXTS[damage](copy / kind)
    heavy = damage in HEAVY and kind in ("model/config.json", "model/tokenizer.json")
    for args in commands(copy, kind, heavy):
        survived(args)
        if kind == "model/config.json" and args[0] != "report" and damage != "dangling":
            refused(args)


@pytest.mark.parametrize("damage", TEXTS)
def test_results_and_tasks(damage, copy):
    for name in ("results.json", "task.jsonl"):
        TEXTS[damage](copy / name)
    refused(["export", copy / "model", copy / "out", "--results", copy / "results.json"], "results.json")
    refused(["report", copy / "model", "-o", copy / "r.html", "--results", copy / "results.json"], "results.json")
    survived(["evaluate", copy / "model", "--tasks", copy / "task.jsonl", "--limit", "1"])


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "no_such"},
        {"_attn_implementation": "kernels-community/x"},
        {"attn_implementation": "someone/kernel@main"},
        {"hidden_size": HUGE},
        {"hidden_size": -1},
        {"hidden_size": "x"},
        {"hidden_size": [1]},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": None},
        {"vocab_size": 1e999},
        {"rope_parameters": {"rope_type": "none"}},
        {"dtype": "int3"},
        {"torch_dtype": 7},
        {"model_type": ["llama"]},
        {"model_type": "no_such"},
        {"quantization_config": {"quant_method": "x"}},
        {"auto_map": {"AutoModelForCausalLM": "x--y.Z"}},
    ],
)
def test_values_in_a_configuration(change, copy):
    file = copy / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    survived(["inspect", copy / "model"])
    survived(["export", copy / "model", copy / "out", "--tokenizer", "none"])
    if any("implementation" in key for key in change):
        refused(["export", copy / "model", copy / "out2", "--tokenizer", "none"], str(copy / "model"))
        with pytest.raises(ValueError, match="of the hub, which is code"):
            CausalLM(str(copy / "model"))
        with pytest.raises(ValueError, match="of the hub, which is code"):
            CausalLM(config=TINY | change)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "{}/none"],
        ["inspect", "/dev/null"],
        ["inspect", "{}/model/config.json"],
        ["export", "{}/model", "~nobody_here/x"],
        ["export", "{}/a.ckpt", "~nobody_here/x", "--masks_only"],
        ["export", "{}/model", "{}/t.txt/x"],
        ["export", "{}/model", "{}/o", "--tokenizer", "~nobody_here/x"],
        ["export", "{}/model", "{}/o", "--results", "~nobody_here/x"],
        ["evaluate", "~nobody_here/x", "--text", "{}/t.txt"],
        ["evaluate", "{}/model", "--text", "~nobody_here/x"],
        ["evaluate", "{}/model", "--text", "{}/t.txt", "--output", "~nobody_here/x.json"],
        ["evaluate", "{}/model", "--text", "{}/t.txt", "--seq_len", str(HUGE)],
        ["evaluate", "{}/model", "--text", "{}/t.txt", "--stride", str(HUGE)],
        ["evaluate", "{}/model", "--text", "{}/t.txt", "--batch_size", str(HUGE)],
        ["evaluate", "{}/model", "--text", "{}/t.txt", "--max_windows", str(HUGE)],
        ["evaluate", "{}/model", "--text", "{}/t.txt", "--device", "no"],
        ["benchmark", "{}/model", "--batch_size", str(HUGE)],
        ["benchmark", "{}/model", "--prompt_tokens", str(HUGE)],
        ["benchmark", "{}/model", "--new_tokens", str(HUGE)],
        ["benchmark", "{}/model", "--repeats", "-1"],
        ["report", "{}/model", "-o", "{}/none/r.html"],
        ["report", "{}/model", "-o", "~nobody_here/r.html", "--results", "~nobody_here/x"],
        ["quickstart", "--steps", "-1"],
        ["quickstart", "--output", "{}/t.txt"],
    ],
)
def test_odd_arguments(args, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    survived([arg.replace("{}", str(files)) for arg in args])


@pytest.mark.few_fast(5)
@pytest.mark.parametrize(
    "changes",
    [
        {"pruning": {"num_samples": HUGE, "score": "wanda"}},
        {"data": {"vocab_size": HUGE}},
        {"data": {"cache_dir": "~nobody_here/x"}},
        {"model": {"config": TINY | {"hidden_act": "no_such"}}},
    ],
    ids=str,
)
def test_odd_numbers_of_a_fit(changes, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an unknown user's home is a folder of that name here
    survived(["fit", "--config", fit_config(copy, **changes)])
