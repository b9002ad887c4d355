"""The card is read as the hub reads it, and its figures compared with the tensors."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tiny import TINY, make_tokens
from transformers import AutoModelForCausalLM

from lightning_prune import CausalLM, WeightPruning
from lightning_prune.checkpoints.export import ExportError, export
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.checkpoints.reading import open_checkpoint
from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.cli import main
from lightning_prune.evaluation.evaluate import evaluate
from lightning_prune.text.data import EMBEDDED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    L.seed_everything(0, verbose=False)
    module = CausalLM(config=TINY)
    pruning = WeightPruning(
        score="wanda", sparsity=0.25, num_samples=3, calibration=[{"input_ids": make_tokens(4, 8)}], seed=5
    )
    rows = [{"input_ids": row} for row in make_tokens(4, 8)]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[pruning],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


class OwnPruning(WeightPruning):
    """A subclass, whose key in the checkpoint is its own name."""


def test_the_masks_of_a_subclass_are_found(tmp_path):
    module = CausalLM(config=TINY)
    rows = [{"input_ids": row} for row in make_tokens(4, 8)]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[OwnPruning(score="magnitude")],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert "OwnPruning" in torch.load(tmp_path / "own.ckpt", weights_only=True)["callbacks"]
    assert inspect(tmp_path / "own.ckpt").masks == 14
    assert export(tmp_path / "own.ckpt", tmp_path / "out").masks == 14
    assert read_card(tmp_path / "out")[2]["score"] == ["magnitude"]
    # The module that was trained says the same of itself.
    uploaded = {}

    class Api:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, **options):
            uploaded[repo_id] = options

        def upload_folder(self, repo_id, folder_path, **options):
            uploaded["files"] = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}
            uploaded["options"] = options
            return "https://huggingface.co/owner/out/commit/1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_prune.text.module.HfApi", Api)
        address = module.push_to_hub("owner/out", private=True, token="t", commit_message="m")
    assert address.endswith("/commit/1")
    assert (uploaded["token"], uploaded["owner/out"]) == ("t", {"private": True, "exist_ok": True})
    assert uploaded["options"] == {"commit_message": "m"}
    for name in ("README.md", "sparsity.json", "model.safetensors", "config.json"):
        assert uploaded["files"][name] == (tmp_path / "out" / name).read_bytes(), name


def read_card(folder):
    """Metadata, text, and the rows of all tables."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return yaml.safe_load(head), text, {row[0]: row[1:] for row in rows}


def test_method_and_figures(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out")
    head, text, rows = read_card(tmp_path / "out")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse", "lightning-prune"],
    }
    expected = {"score": "wanda", "sparsity asked for": "0.25", "calibration samples": "3", "seed": "5"}
    assert {key: rows[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert rows["masks"][0].startswith("14;")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    pruned = [t for name, t in state.items() if "_proj" in name]
    zeros, weights = sum(int((t == 0).sum()) for t in pruned), sum(t.numel() for t in pruned)
    everything = sum(t.numel() for t in state.values())
    assert f"of {everything:,} parameters. {zeros:,} of the {weights:,} weights in 14 layers" in text
    assert f"({zeros / weights:.2%}; {zeros / everything:.2%} of all parameters)" in text
    assert "runs as fast as the dense one" in text
    assert str(tmp_path) not in text  # nobody's folders
    settings = json.loads((tmp_path / "out" / "sparsity.json").read_text())["settings"]
    assert settings[0]["num_samples"] == 3


@pytest.mark.slow
def test_results_of_an_evaluation(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(EMBEDDED["austen"].read_text(encoding="utf-8")[20_000:23_000], encoding="utf-8")
    tokenizer = trained_tokenizer([text.read_text(encoding="utf-8")], 300, tmp_path / "cache")
    results = evaluate(checkpoint, [text], tokenizer=tokenizer, seq_len=16, progress=False)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results.to_dict()))
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--results", str(file)]) == 0
    _, _, rows = read_card(tmp_path / "out")
    assert rows["text.txt"][1] == f"{results.models[0].texts[0].perplexity:,.2f}"
    other = torch.load(checkpoint, weights_only=True)
    name = next(name for name in other["state_dict"] if "embed" in name)
    other["state_dict"][name][0, 0] += 1
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(ExportError, match=r"measured another model .*weights_crc32 is"):
        export(tmp_path / "other.ckpt", tmp_path / "new", results=file)
    export(checkpoint, tmp_path / "rounded", dtype="bfloat16", results=file)  # the same model, rounded
    capsys.readouterr()
    for wrong in ("{}", "[]", "[", '{"kind": "lightning-prune evaluate", "models": [{}]}'):
        file.write_text(wrong)
        with pytest.raises(ExportError, match="is no file that lightning-prune evaluate"):
            export(checkpoint, tmp_path / "new", results=file)
    assert not (tmp_path / "new").exists()


def test_models_that_are_dense_or_2_4_or_from_the_hub(checkpoint, tmp_path):
    module = CausalLM(config=TINY)
    module.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "out")
    head, text, rows = read_card(tmp_path / "out")
    assert head["tags"] == ["lightning-prune"]
    assert "## Pruning" not in text
    assert rows == {}
    for name, weight in module.model.named_parameters():
        if "_proj" in name:
            weight.data[:, ::2] = 0
    module.save_pretrained(tmp_path / "sparse")
    export(tmp_path / "sparse", tmp_path / "out2")
    _, text, rows = read_card(tmp_path / "out2")
    assert rows["N:M pattern"] == ["2:4"]
    assert "to_sparse_semi_structured" in text
    stored = torch.load(checkpoint, weights_only=True)
    for model, base in (("owner/name", "owner/name"), ("/home/me/model", None)):
        stored["hyper_parameters"]["model"] = model
        torch.save(stored, tmp_path / "changed.ckpt")
        export(tmp_path / "changed.ckpt", tmp_path / "out3", overwrite=True)
        assert read_card(tmp_path / "out3")[0].get("base_model") == base
        assert "/home/me" not in (tmp_path / "out3" / "README.md").read_text()


def test_names_and_settings_of_strangers_stay_text(checkpoint, tmp_path):
    """A checkpoint may come from anybody: what it says must not become metadata or a table of its own."""
    stored = torch.load(checkpoint, weights_only=True)
    stored["hyper_parameters"]["model"] = 'x"\nlicense: mit\ntags: [safe]\n'
    (key,) = [key for key in stored["callbacks"] if key.startswith("WeightPruning")]
    stored["callbacks"][key]["score"] = "a | b\n---\n# c"
    torch.save(stored, tmp_path / "changed.ckpt")
    assert len(open_checkpoint(tmp_path / "changed.ckpt"))
    export(tmp_path / "changed.ckpt", tmp_path / "out")
    head, text, _ = read_card(tmp_path / "out")
    assert "license" not in head
    assert "\n# c" not in text
