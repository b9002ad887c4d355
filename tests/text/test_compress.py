"""The commands that prune and shrink a model into a folder: figures, zeros, and what a failure leaves behind."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from measured_models import make_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prune import compress, prune, shrink
from lightning_prune.cli import main, parser_of
from lightning_prune.perp import reconstruct
from lightning_prune.structure import device_goals, permute_channels, read_structure
from lightning_prune.structure.sizes import UNIT_TYPES
from lightning_prune.text.compress import Compressed
from lightning_prune.text.documents import texts_of

SMALL = {"seq_len": 32, "num_samples": 4, "windows": 3, "progress": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def naive(folder: Path, rows: torch.Tensor) -> float:
    """Perplexity of windows ``[N, T]``, token by token in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    with torch.no_grad():
        for row in rows:
            logs = model(row[None]).logits[0].double().log_softmax(-1)
            losses += [-logs[t, row[t + 1]].item() for t in range(len(row) - 1)]
    return torch.tensor(losses, dtype=torch.float64).mean().exp().item()


def windows_of(folder: Path, text: Path, begin: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and windows as the documentation says: the last tenth of the windows is held out, both evenly spread."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    own = 32 - len(begin)
    rows = torch.tensor([[*begin, *ids[i : i + own]] for i in range(0, len(ids) - own + 1, own)])
    held = len(rows) // 10
    first, last = rows[:-held], rows[-held:]
    return first[[i * len(first) // 4 for i in range(4)]], last[[i * len(last) // 3 for i in range(3)]]


def check_report(done: Compressed, dense: Path, text: Path) -> None:
    _, windows = windows_of(dense, text)
    assert done.perplexity_before == pytest.approx(naive(dense, windows), rel=1e-5)
    assert done.perplexity == pytest.approx(naive(done.output, windows), rel=1e-5)
    card = (done.output / "README.md").read_text(encoding="utf-8")
    assert f"| dense | {done.perplexity_before:,.2f} |" in card
    assert f"{done.perplexity:,.2f} |" in card
    assert str(dense) not in card


def test_prune_is_prune_of_the_samples(files, tmp_path, capsys):
    before = {f.name: f.read_bytes() for f in files.dense.iterdir()}
    done = compress(files.dense, tmp_path / "out", str(files.text), sparsity=0.4, batch_size=2, **SMALL)
    check_report(done, files.dense, files.text)
    samples, _ = windows_of(files.dense, files.text)
    expected = AutoModelForCausalLM.from_pretrained(files.dense)
    batches = [{"input_ids": samples[:2]}, {"input_ids": samples[2:]}]
    masks = prune(expected, batches, score="kfac", sparsity=0.4, num_samples=4, progress=False)
    written = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(written[name], p) for name, p in expected.named_parameters())
    assert sum(int((~mask).sum()) for mask in masks.values()) == done.found.totals().zeros
    stored = json.loads((tmp_path / "out" / "sparsity.json").read_text(encoding="utf-8"))
    assert (stored["score"], stored["zeros"]) == ("kfac", done.found.totals().zeros)
    assert stored["settings"][0]["num_samples"] == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id is not None
    assert {f.name: f.read_bytes() for f in files.dense.iterdir()} == before
    shown, beside = capsys.readouterr()
    assert "Generating" not in beside  # a bar of the datasets library
    assert (
        shown.index("dense: perplexity")
        < shown.index("Pruning by kfac, 4 samples of 32 tokens")
        < shown.index("Written:")
    )
    assert repr(done.prompt) in shown
    assert repr(done.written) in shown


def test_samples_and_windows_begin_as_the_tokenizer_begins_texts(tmp_path):
    begun = make_models(tmp_path, begin=7)
    done = compress(begun.dense, tmp_path / "out", str(begun.text), score="wanda", prompt="It was", **SMALL)
    samples, windows = windows_of(begun.dense, begun.text, begin=(7,))
    assert done.perplexity_before == pytest.approx(naive(begun.dense, windows), rel=1e-5)
    expected = AutoModelForCausalLM.from_pretrained(begun.dense)
    prune(expected, [{"input_ids": samples}], score="wanda", num_samples=4, progress=False)
    written = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(written[name], p) for name, p in expected.named_parameters())
    prompt = torch.tensor([[7, *begun.tokenizer("It was", add_special_tokens=False)["input_ids"][-7:]]])
    how = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": begun.tokenizer.eos_token_id}
    said = expected.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0, prompt.shape[1] :]
    assert done.written == begun.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.slow
def test_orders_and_fits_are_those_of_the_functions(files, tmp_path, capsys):
    samples, _ = windows_of(files.dense, files.text)
    model = AutoModelForCausalLM.from_pretrained(files.dense)
    dense = copy.deepcopy(model)
    for each in (model, dense):
        permute_channels(each, [{"input_ids": samples}], "2:4", num_samples=4, progress=False)
    order = model.model.embed_tokens.weight.detach().clone()
    assert not torch.equal(order, AutoModelForCausalLM.from_pretrained(files.dense).model.embed_tokens.weight)
    batches = [{"input_ids": samples}]
    masks = prune(model, batches, pattern="2:4", update="exact", sequential=True, num_samples=4, progress=False)
    before = copy.deepcopy(model.state_dict())
    pairs = [{"input_ids": rows} for rows in samples.split(2)]
    reconstruct(model, pairs, dense, masks, train="all", num_samples=4, progress=False)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    done = compress(
        files.dense, tmp_path / "out", str(files.text), pattern="2:4", update="exact", sequential=True, permute=True,
        fit=True, **SMALL,
    )  # fmt: skip
    found = AutoModelForCausalLM.from_pretrained(done.output).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert done.settings["permute"]
    assert "channels in another order, kfac with update exact, block by block, half-block fit, 4 samples" in (
        capsys.readouterr().out
    )


def test_orders_that_cannot_be_are_refused_before_anything_is_measured(files, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"pattern='3:5': 32 channels of 'hidden' do not divide by 5"):
        compress(files.dense, tmp_path / "out", str(files.text), pattern="3:5", permute=True, **SMALL)
    assert "perplexity" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["nothere"]}, ValueError, "targets='nothere' matches no layer"),
        ({"ignore": ["model.layers.*"]}, ValueError, "nothing to prune"),
        ({"pattern": "3:5"}, ValueError, "inputs of .* do not divide by 5"),
    ],
)
def test_layers_that_cannot_be_chosen_are_refused_before_anything_is_measured(
    files, tmp_path, capsys, options, error, message
):
    with pytest.raises(error, match=message):
        compress(files.dense, tmp_path / "out", str(files.text), **options, **SMALL)
    assert "perplexity" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [({"target": 0.01}, "target=0.01"), ({"rounds": 0}, "rounds=0"), ({"types": ("expert",)}, "types=")],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_measured(files, tmp_path, capsys, options, message):
    with pytest.raises(ValueError, match=message):
        shrink(files.dense, tmp_path / "out", text=str(files.text), **options, **SMALL)
    assert "perplexity" not in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_one_name_in_place_of_several_is_refused_before_a_model_is_loaded(tmp_path, argument):
    with pytest.raises(TypeError, match=rf"write {argument}=\['mlp'\]"):
        compress("owner/a-model-that-would-be-downloaded", tmp_path / "out", **{argument: "mlp"})


def test_layers_can_be_chosen_by_class(files, tmp_path):
    chosen = {"targets": [torch.nn.Linear], "ignore": ("lm_head", "mlp"), "score": "magnitude"}
    with torch.inference_mode():  # in which no weight that is loaded could be changed
        done = compress(files.dense, tmp_path / "out", str(files.text), **chosen, **SMALL)
    stored = json.loads((tmp_path / "out" / "sparsity.json").read_text(encoding="utf-8"))["settings"][0]
    assert (stored["targets"], stored["ignore"]) == (["Linear"], ["lm_head", "mlp"])
    assert {t.name.split(".")[3] for t in done.found.selected() if t.zeros} == {"self_attn"}


def test_shrink_ends_with_an_ordinary_model(files, tmp_path):
    done = shrink(files.dense, tmp_path / "out", 0.9, str(files.text), **SMALL)
    check_report(done, files.dense, files.text)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(files.dense)
    assert small.num_parameters() <= 0.9 * whole.num_parameters()
    sizes = json.loads((tmp_path / "out" / "sparsity.json").read_text(encoding="utf-8"))["sizes"]
    assert sizes["parameters"] == {"before": whole.num_parameters(), "now": small.num_parameters()}
    assert sizes["intermediate_size"]["now"] == small.config.intermediate_size < whole.config.intermediate_size


def test_a_time_as_target_is_measured_once(files, tmp_path, monkeypatch):
    table, measured = device_goals.LatencyTable((1.0, 1e6), (0.0, 1.0)), []  # in proportion to weights
    monkeypatch.setattr(device_goals, "_measured", lambda *_: measured.append(1) or table)
    structure = read_structure(AutoModelForCausalLM.from_pretrained(files.dense))
    now = device_goals.latency_of(structure, {}, table).seconds(structure.sizes)
    goal = {"seconds_per_token": 0.8 * now, "batch": 1}
    shrink(files.dense, tmp_path / "out", goal, str(files.text), rounds=2, **SMALL)
    assert len(measured) == 1
    small = read_structure(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert device_goals.latency_of(small, {}, table).seconds(small.sizes) <= 0.8 * now


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ({"targets": ["lm_head"]}, "none (unstructured)"),
        ({"targets": ["lm_head"], "pattern": "2:4"}, "2:4 in 1 of 15 layers"),
        ({"ignore": [], "pattern": "2:4"}, "2:4"),
    ],
)
def test_a_head_that_is_pruned_is_told_of(files, tmp_path, capsys, how, pattern):
    compress(files.dense, tmp_path / "out", str(files.text), score="magnitude", **how, **SMALL)
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight
    told = f"{int((head == 0).sum()):,} of the {head.numel():,} weights of lm_head.weight (50.00%)"
    assert f"besides {told}; " in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"Besides these: {told}." in card
    assert "- sparse\n" in card
    assert f"| N:M pattern | {pattern} |" in card
    assert f"| masks | {15 if 'ignore' in how else 1};" in card
    stored = json.loads((tmp_path / "out" / "sparsity.json").read_text(encoding="utf-8"))
    assert stored["layers"]["lm_head.weight"]["zeros"] == 2 * stored["layers"]["lm_head.weight"]["weights"] // 4
    assert stored["weights"] == sum(layer["weights"] for layer in stored["layers"].values()) - head.numel()


@pytest.mark.slow
def test_the_commands(files, tmp_path, capsys):
    options = ["--seq_len", "32", "--num_samples", "2", "--windows", "2", "--text", str(files.text), "--device", "cpu"]
    out = str(tmp_path / "out")
    assert main(["prune", str(files.dense), out, "--score", "wanda", "--pattern", "2:4", *options]) == 0
    assert "exact zeros (50.00%)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "sparsity.json").read_text(encoding="utf-8"))["pattern"] == "2:4"
    assert main(["shrink", str(files.dense), out, "--target", "0.9", "--rounds", "2", "--overwrite", *options]) == 0
    made = json.loads((tmp_path / "out" / "sparsity.json").read_text(encoding="utf-8"))
    assert "sizes" in made
    assert made["settings"][0]["rounds"] == 2
    chosen = ["--targets", "mlp", "self_attn", "--ignore", "model.layers.0.*", "--overwrite"]
    assert main(["prune", str(files.dense), out, "--score", "wanda", *chosen, *options]) == 0
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert {name for name, weight in weights.items() if (weight == 0).any()} == {
        name for name in weights if ".layers.1." in name and "_proj" in name
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "model.layers.0.*" in card
    # The pruned model is a model like any other.
    assert main(["prune", out, str(tmp_path / "twice"), "--score", "magnitude", "--prompt", "It was", *options]) == 0
    assert "'It was' ..." in capsys.readouterr().out


@pytest.mark.slow
def test_minutes_choose_what_fits(files, tmp_path, monkeypatch, capsys):
    """Costs by hand: passes of the table, and of kfac's sweep, times the seconds of a window, of what is left."""
    from lightning_prune.text import compress as command

    clock = iter(range(0, 10_000, 2))  # each look at it takes two seconds
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    table = {"kfac-exact": ("kfac", 8, 5.0, 20.0), "kfac": ("kfac", 4, 3.0, 8.0), "wanda": ("wanda", 4, 1.0, 1.0)}
    recipes = tuple(
        (command.Recipe(score, samples, *(("exact", True) if name == "kfac-exact" else ())), sample, once)
        for name, (score, samples, sample, once) in table.items()
    )
    monkeypatch.setattr(command, "_RECIPES", recipes)
    monkeypatch.setattr(command, "_WIDTH", 64)
    width = AutoModelForCausalLM.from_pretrained(files.dense).config.hidden_size / 64
    # Two seconds a measurement, of three windows; two of loading; ten have gone by when it is asked.
    costs = [2 / 3 * (8 * (5 + 2.7) + 20 * width), 2 / 3 * (4 * 3 + 8), 2 / 3 * (4 + 1)]
    spent = 8 + 2 + 2
    small = {name: value for name, value in SMALL.items() if name != "num_samples"}
    for cost, score in zip(costs, ("kfac with update exact, block by block, 8", "kfac, 4", "wanda, 4"), strict=True):
        clock = iter(range(0, 10_000, 2))
        done = compress(
            files.dense, tmp_path / "out", str(files.text), minutes=(spent + cost + 0.1) / 60, overwrite=True, **small
        )
        assert f"{score} samples" in capsys.readouterr().out
        assert done.settings["num_samples"] == int(score.split()[-1])
    clock = iter(range(0, 10_000, 2))
    with pytest.raises(ValueError, match="are too few on this device; the quickest takes"):
        compress(files.dense, tmp_path / "new", str(files.text), minutes=spent / 60, **small)
    assert not (tmp_path / "new").exists()
    for wrong in (
        {"minutes": -1}, {"minutes": float("nan")}, {"minutes": "5"}, {"minutes": 5, "score": "wanda"},
        {"minutes": 5, "num_samples": 4},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="stands in place of score"):
            compress(files.dense, tmp_path / "new", **wrong)


def test_the_samples_that_are_told_are_those_that_are_there(files, tmp_path, capsys):
    done = compress(files.dense, tmp_path / "out", str(files.text), score="wanda", **SMALL | {"num_samples": 100_000})
    assert f"Pruning by wanda, {done.settings['num_samples']} samples of" in capsys.readouterr().out
    assert done.settings["num_samples"] < 100_000


@pytest.mark.parametrize("function", [compress, shrink])
@pytest.mark.parametrize("part", [{"text_name": "wikitext-2-raw-v1"}, {"text_split": "test"}])
def test_parts_of_hub_datasets_are_refused_of_files(part, function, files, tmp_path, capsys):
    (name,) = part
    with pytest.raises(ValueError, match=f"{name}='.*' is of datasets on the hub, and text='.*' is on this machine"):
        function(files.dense, tmp_path / "out", text=str(files.text), **part)
    assert capsys.readouterr().out == ""


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(files, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"output='.*sub' cannot be written \(Not a directory: '.*file'\)"):
        compress(files.dense, tmp_path / "file" / "more" / "sub", str(files.text), **SMALL)
    assert capsys.readouterr().out == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1.5"], "sparsity=1.5"),
        (["--score", "best"], "score='best'"),
        (["--pattern", "2:3:4"], "pattern"),
        (["--num_samples", "0"], "num_samples=0"),
        (["--text", "/no/such.txt"], "is not an existing file"),
        (["--text_field", "words"], "text_field='words' names no text"),
        (["--seq_len", "100000"], "seq_len=100000"),
        (["--seq_len", "0"], "seq_len=0 must be"),
        (["--batch_size", "0"], "batch_size=0 must be"),
        (["--fit", "--sparsity", "0"], "nothing goes that what stays could make up for"),
        (["--fit", "--score", "keep"], "nothing goes that what stays could make up for"),
        (["--minutes", "5", "--sparsity", "0"], "nothing goes that what stays could make up for"),
        (["--prompt", "x", "--update", "best"], "update"),
        (["--permute"], "permute=True: the order of channels matters for N:M only"),
    ],
)
def test_a_failure_leaves_the_old_folder(files, tmp_path, capsys, options, message, request):
    datasets.disable_progress_bars()  # it shows one when it reads a text for the first time
    request.addfinalizer(datasets.enable_progress_bars)
    shutil.copytree(files.dense, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    text = [] if "--text" in options else ["--text", str(files.text)]
    small = [] if "--seq_len" in options else ["--seq_len", "32"]
    command = ["prune", str(files.dense), str(tmp_path / "out"), *text, *small, "--overwrite", *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_is_written_begins_with_a_word(files, tmp_path):
    text, blank = tmp_path / "text.txt", "\n \t" * 400
    text.write_text(files.text.read_text(encoding="utf-8")[:2000] + blank, encoding="utf-8")
    with pytest.raises(ValueError, match=r"no window of held-out text=.*begins with a word: give a prompt"):
        compress(files.dense, tmp_path / "out", str(text), **SMALL)


def test_a_text_that_is_not_there_is_said_before_a_model_is_loaded(tmp_path):
    for command in (compress, shrink):
        with pytest.raises(FileNotFoundError, match=r"text='\./none\.txt' is not an existing file"):
            command("owner/a-model-that-would-be-downloaded", tmp_path / "out", text="./none.txt")


def test_the_model_itself_is_no_output(files, tmp_path):
    with pytest.raises(ValueError, match="is or holds the checkpoint"):
        compress(files.dense, files.dense, overwrite=True)
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        compress(files.dense, files.pruned)


def test_paths_and_homes(files, tmp_path, monkeypatch):
    """A single path is a text, and the model's own generation settings are found from a home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(files.dense, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    done = compress("~/model", "~/out", files.text, score="magnitude", tokenizer=files.dense, **SMALL)
    assert done.output == tmp_path / "out"
    assert json.loads((done.output / "generation_config.json").read_text())["temperature"] == 0.5


def test_text_of_every_kind(tmp_path):
    import datasets

    rows = [{"text": "one", "words": 1}, {"text": " ", "words": 0}, {"text": "two", "words": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a.txt").write_text("alpha\nbeta", encoding="utf-8")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert list(texts_of(str(tmp_path / "rows.jsonl"))) == ["one", "two"]
    assert list(texts_of(str(tmp_path / "saved"))) == ["one", "two"]
    assert list(texts_of([str(tmp_path / "a.txt"), str(tmp_path / "a.txt")])) == ["alpha\nbeta"] * 2
    assert next(texts_of("austen")).startswith("PRIDE AND PREJUDICE")
    with pytest.raises(ValueError, match=r"text_field='words' names no text .* it holds a int in a row"):
        list(texts_of(str(tmp_path / "saved"), text_field="words"))
    with pytest.raises(ValueError, match=r"text_field='body' names no text .* it is none of \['text', 'words'\]"):
        list(texts_of(str(tmp_path / "saved"), text_field="body"))


def test_the_help_of_shrink_names_all_units_as_they_are_called():
    (option,) = [action for action in parser_of("shrink")._actions if action.dest == "types"]
    named = re.sub(r"\(.*?\)", "", option.help.partition(":")[2].partition(".")[0])
    assert tuple(named.replace(" ", "").split(",")) == UNIT_TYPES
