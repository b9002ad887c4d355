"""The quickstart, made small: what its files say must be true of its files."""

import io
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prune import quickstart as module
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.cli import main
from lightning_prune.quickstart import SCORES, check_zeros, quickstart, unigram_perplexity
from lightning_prune.text.data import EMBEDDED, TextDataModule

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def run(folder, **kwargs):
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MODEL", module.MODEL | SMALL)
        small = {"steps": 12, "retrain_steps": 3, "num_samples": 8}
        results = quickstart(folder, console=Console(file=out, width=120), **(small | kwargs))
    return results, out.getvalue()


@pytest.fixture(scope="module", autouse=True)
def short(tmp_path_factory):
    """The beginning of the book."""
    file = tmp_path_factory.mktemp("book") / "text.txt"
    file.write_text(EMBEDDED["austen"].read_text(encoding="utf-8")[:250_000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EMBEDDED, "austen", file)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, *run(folder)


@pytest.mark.slow
def test_results_are_those_on_disk(finished):
    folder, results, text = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    names = [row["folder"] for row in results["models"]]
    slugs = ("50", "75", "2-4")
    assert set(names) == (
        {"dense", "dense-longer"} | {f"{s}-{z}" for z in slugs for s in SCORES} | {f"kfac-{z}-retrained" for z in slugs}
    )
    for picture in ("perplexity.png", "sparsity.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    for row in results["models"]:
        assert f"{row['perplexity']:.2f}" in text


@pytest.mark.slow
def test_the_command_it_names_last_writes_a_report(finished):
    folder, _, text = finished
    (command,) = [line for line in text.splitlines() if line.startswith("lightning-prune report")]
    assert main(command.split()[1:]) == 0
    assert (folder / "report.html").is_file()


def test_curves_hold_what_the_table_says(finished):
    _, results, _ = finished
    owner = SimpleNamespace(rows=[module.Row(**row) for row in results["models"]])
    curves = module._Quickstart.curves(owner)
    assert set(curves) == {*SCORES, "kfac, retrained"}
    for row in results["models"]:
        if row["zeros"] in ("50 %", "75 %"):
            assert curves[row["model"]][row["sparsity"]] == row["perplexity"]
    assert all(len(points) == 2 for points in curves.values())


def test_sparsity_of_every_folder(finished):
    folder, results, _ = finished
    for row in results["models"]:
        inspection = inspect(folder / row["folder"])
        assert inspection.sparsity == row["sparsity"]
        wanted = {"": 0.0, "50 %": 0.5, "75 %": 0.75, "2:4": 0.5}[row["zeros"]]
        assert row["sparsity"] == pytest.approx(wanted)
        assert inspection.pattern == ("2:4" if row["zeros"] == "2:4" else None)


@pytest.mark.slow
def test_perplexity_of_a_folder_is_the_naive_one(finished):
    """Held-out text, tokenized with the saved tokenizer; log-softmax in float64; block by block."""
    folder, results, _ = finished
    data = TextDataModule(
        "austen", vocab_size=2048, block_size=128, validation_share=0.1, cache_dir=str(folder / "cache")
    )
    data.setup("fit")
    (row,) = [row for row in results["models"] if row["folder"] == "kfac-75"]
    model = AutoModelForCausalLM.from_pretrained(folder / "kfac-75").eval()
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for block in data.val_dataset:
            ids = torch.tensor([block["input_ids"]])
            logp = model(ids).logits.double().log_softmax(-1)[0, :-1]
            nll -= float(logp[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum())
            tokens += ids.shape[1] - 1
    assert row["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    # training and held-out blocks share no text
    train = {tuple(block["input_ids"]) for block in data.train_dataset}
    assert not train & {tuple(block["input_ids"]) for block in data.val_dataset}
    tokenizer = AutoTokenizer.from_pretrained(folder / "kfac-75")
    assert tokenizer("Mr. Darcy")["input_ids"] == data.tokenizer("Mr. Darcy")["input_ids"]


def test_retraining_keeps_the_zeros_of_pruning(finished):
    folder, _, _ = finished
    for zeros in ("50", "75", "2-4"):
        before = AutoModelForCausalLM.from_pretrained(folder / f"kfac-{zeros}").state_dict()
        after = AutoModelForCausalLM.from_pretrained(folder / f"kfac-{zeros}-retrained").state_dict()
        for name in before:
            if "proj" in name:
                assert bool((after[name][before[name] == 0] == 0).all()), name
                assert not torch.equal(before[name], after[name])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path, monkeypatch):
    """With one score and one pattern, and fewer steps: a dense model, a pruned and a retrained one."""
    monkeypatch.setattr(module, "SCORES", ("kfac",))
    monkeypatch.setattr(module, "SETTINGS", dict(list(module.SETTINGS.items())[:1]))
    first, second, other = (run(tmp_path / str(n), seed=seed, steps=4)[0] for n, seed in enumerate((0, 0, 1)))
    numbers = [[(r["folder"], r["perplexity"], r["sparsity"]) for r in x["models"]] for x in (first, second, other)]
    assert numbers[0] == numbers[1]
    assert first["unigram_perplexity"] == second["unigram_perplexity"]
    assert all(one[1] != changed[1] for one, changed in zip(numbers[0], numbers[2], strict=True))


def test_unigram_perplexity_by_hand():
    train = [{"input_ids": [0, 0, 1]}, {"input_ids": [2, 0, 1]}]
    held_out = [{"input_ids": [3, 0, 1]}, {"input_ids": [0, 3, 3]}]
    counts = Counter(token for block in train for token in block["input_ids"])
    chance = [(counts[token] + 1) / (6 + 4) for token in range(4)]
    expected = np.exp(-np.mean([np.log(chance[token]) for token in (0, 1, 3, 3)]))
    assert unigram_perplexity(train, held_out, 4) == pytest.approx(expected)


def test_a_saved_model_without_its_zeros_is_refused():
    mask = torch.tensor([[True, False], [True, True]])
    check_zeros({"a": torch.tensor([[1.0, -0.0], [1.0, 0.0]])}, {"a": mask}, "x")
    with pytest.raises(ValueError, match="1 masked weights of 'a'"):
        check_zeros({"a": torch.tensor([[1.0, 1e-20], [1.0, 0.0]])}, {"a": mask}, "x")


@pytest.mark.parametrize("argument", ["steps", "retrain_steps", "num_samples"])
def test_numbers_below_one_are_refused(argument, tmp_path):
    with pytest.raises(ValueError, match=argument):
        quickstart(tmp_path, **{argument: 0})


def test_a_folder_with_other_models_is_refused(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "file").write_text("x")
    for folder, message in ((tmp_path, "holds a folder 'dense'"), (tmp_path / "file", "cannot be written")):
        with pytest.raises(ValueError, match=f"output='{folder}' {message}"):
            quickstart(folder)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["dense", "file"]
    own = tmp_path / "dense" / "results.json"
    own.write_text("[1]")
    with pytest.raises(ValueError, match=r"holds a file 'results\.json' that no earlier quickstart has left"):
        quickstart(own.parent)
    assert own.read_text() == "[1]"


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_seeds_that_nothing_takes_are_refused_at_once(seed, tmp_path):
    with pytest.raises(ValueError, match=f"seed={seed} must be"):
        quickstart(tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()
