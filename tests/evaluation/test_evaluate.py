import hashlib
import json
import math
import sys

import pytest
import torch
from measured_models import make_models
from transformers import AutoModelForCausalLM

from lightning_prune import CausalLM
from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.cli import main
from lightning_prune.evaluation.evaluate import evaluate
from lightning_prune.results import (
    EvaluationResults,
    ModelResult,
    TextResult,
    check_outputs,
    evaluation_tables,
    write_results,
)
from lightning_prune.safety import replace_text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def naive_perplexity(folder, tokenizer, text, seq_len, stride, begin=()):
    """Each window from its start, in float64; tokens that a window before it has predicted count once."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if begin:
        return naive_perplexity_after(begin, model, ids, seq_len - 1, stride)
    total, tokens, predicted_to = 0.0, 0, 0
    starts = range(0, len(ids) - seq_len + 1, stride)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[s : s + seq_len] for s in starts]), use_cache=False).logits
    for start, found in zip(starts, logits.log_softmax(-1).numpy(), strict=True):
        for position in range(1, seq_len):
            if start + position >= predicted_to and not (start and position < seq_len - stride):
                total -= float(found[position - 1, ids[start + position]])
                tokens += 1
        predicted_to = start + seq_len
    return math.exp(total / tokens), tokens


def naive_perplexity_after(begin, model, ids, own, stride):
    """The same for windows of so many tokens after those that each begins with."""
    total, predicted = 0.0, set()
    for start in range(0, len(ids) - own + 1, stride):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*begin, *ids[start : start + own]]]), use_cache=False).logits[0]
        for place in range(start, start + own):
            if place not in predicted:
                total -= logits[len(begin) + place - start - 1].log_softmax(-1)[ids[place]].item()
                predicted.add(place)
    return math.exp(total / len(predicted)), len(predicted)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [None, 10])
def test_windows_begin_as_the_tokenizer_begins_texts(stride, tmp_path, files):
    begun = make_models(tmp_path, begin=7)
    results = evaluate(begun.dense, [begun.text], seq_len=32, stride=stride, batch_size=3, progress=False)
    (text,) = results.models[0].texts
    expected, tokens = naive_perplexity(begun.dense, begun.tokenizer, begun.text, 32, stride or 31, begin=[7])
    assert text.perplexity == pytest.approx(expected, rel=1e-5)
    assert (text.tokens, text.seq_len, text.stride) == (tokens, 32, stride or 31)
    assert results.settings["first_token"] == 7
    with pytest.raises(ValueError, match="stride=32 must not be above 31, the tokens of text in a window"):
        evaluate(begun.dense, [begun.text], seq_len=32, stride=32, progress=False)
    with pytest.raises(ValueError, match="has other tokens for"):
        evaluate(begun.dense, [begun.text], baseline=files.dense, seq_len=32, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [None, 10])
def test_perplexity_of_both_models_is_the_naive_one(stride, files):
    results = evaluate(
        files.pruned, [files.text], baseline=files.dense, seq_len=32, stride=stride, batch_size=3, progress=False
    )
    dense, pruned = results.models
    assert (dense.role, pruned.role) == ("baseline", "model")
    assert (dense.zeros, pruned.zeros * 2, pruned.pattern) == (0, pruned.prunable, "2:4")
    for found, folder in ((dense, files.dense), (pruned, files.pruned)):
        (text,) = found.texts
        expected, tokens = naive_perplexity(folder, files.tokenizer, files.text, 32, stride or 32)
        assert text.perplexity == pytest.approx(expected, rel=1e-5)
        assert (text.tokens, text.seq_len, text.stride) == (tokens, 32, stride or 32)
        assert text.sha256 == hashlib.sha256(files.text.read_bytes()).hexdigest()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert found.parameters == sum(p.numel() for p in model.parameters())
    assert dense.texts[0].perplexity != pruned.texts[0].perplexity


def test_texts_of_the_same_name_are_told_apart(files, tmp_path):
    texts = [tmp_path / folder / "valid.txt" for folder in ("a", "b")]
    for number, text in enumerate(texts):
        text.parent.mkdir()
        text.write_text(files.text.read_text()[number:])
    options = {"seq_len": 32, "max_windows": 2, "progress": False}
    (model,) = evaluate(files.dense, texts, **options).models
    assert [text.text for text in model.texts] == ["a/valid.txt", "b/valid.txt"]
    (model,) = evaluate(files.dense, texts[:1] * 2, **options).models
    assert [text.text for text in model.texts] == ["valid.txt"]


@pytest.mark.slow
def test_a_checkpoint_is_the_model_in_it(files, tmp_path):
    import lightning as L

    module = CausalLM(str(files.pruned))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    of_object = evaluate(files.model, [files.text], tokenizer=files.tokenizer, seq_len=32, progress=False).models[0]
    of_checkpoint = evaluate(
        tmp_path / "a.ckpt", [files.text], tokenizer=files.pruned, seq_len=32, progress=False
    ).models[0]
    assert of_checkpoint.texts == of_object.texts
    assert (of_checkpoint.zeros, of_checkpoint.parameters) == (of_object.zeros, of_object.parameters)


@pytest.mark.slow
def test_command(files, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    outputs = [str(tmp_path / "results.json"), str(tmp_path / "results.md")]
    options = ["--text", str(files.text), "--tasks", f"blimp:{files.pairs}", "--baseline", str(files.dense)]
    code = main(["evaluate", str(files.pruned), *options, "--seq_len", "32", "--output", *outputs])
    out = capsys.readouterr()
    assert (code, out.err) == (0, "")
    results = json.loads((tmp_path / "results.json").read_text())
    document = (tmp_path / "results.md").read_text()
    assert document == f"# Evaluate {files.pruned}\n\n" + (
        "\n\n".join(table.markdown() for table in evaluation_tables(results)) + "\n"
    )
    dense, pruned = results["models"]
    assert [task["task"] for task in pruned["tasks"]] == ["agreement", "other", "pairs"]
    for text in (f"{dense['texts'][0]['perplexity']:,.2f}", f"{pruned['tasks'][2]['value']:.4f} ±", "50.0% zeros"):
        assert text in document
        assert text in out.out
    assert "in windows of 32 tokens without overlap" in document
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (tmp_path / "results.json").stat().st_mode & 0o444 == 0o444  # not the private mode of temporary files
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to measure"),
        (["--text", "/no/such.txt"], "text='/no/such.txt' is not an existing file"),
        (["--text", "EMPTY"], "is empty"),
        (["--text", "TEXT", "--limit", "3"], "limit=3 is of tasks, and there is none to measure"),
        (["--tasks", "a.jsonl", "--stride", "3"], "stride=3 is of text, and there is none to measure"),
        (["--text", "BINARY"], "is not UTF-8"),
        (["--text", "TEXT", "--seq_len", "1"], "seq_len=1 must be a whole number of at least 2"),
        (["--text", "TEXT", "--seq_len", "65"], "seq_len=65 is longer than the 64 tokens"),
        (["--text", "TEXT", "--stride", "0"], "stride=0 must be a whole number of at least 1"),
        (["--text", "TEXT", "--seq_len", "32", "--stride", "33"], "stride=33 must not be above"),
        (["--text", "SHORT", "--seq_len", "32"], "fewer than one window of seq_len=32"),
        (["--text", "TEXT", "--batch_size", "0"], "batch_size=0 must be a whole number of at least 1"),
        (["--text", "TEXT", "--device", "gpu"], "device='gpu' is not there"),
        (["--text", "TEXT", "--dtype", "int8"], "dtype='int8' is not known"),
        (["--text", "TEXT", "--baseline", "/no/such"], "baseline='/no/such' is not an existing"),
        (["--text", "TEXT", "--output", "results.csv"], "must end in .json or .md"),
        (["--text", "TEXT", "--output", "/no/such/results.md"], "in a folder that does not exist"),
        (["--text", "TEXT", "--seq_len", "32", "--baseline", "OTHER"], "has other tokens"),
        (["--text", "TEXT", "--seq_len", "32", "--tokenizer", "none"], "has no tokenizer; give one"),
    ],
)
def test_user_errors_are_one_line(options, message, files, tmp_path, capsys):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short").write_text("Two words.")
    if "OTHER" in options:
        files.model.save_pretrained(tmp_path / "other")
        trained_tokenizer(["aaaa bbbb " * 99], 300, tmp_path / "cache").save_pretrained(tmp_path / "other")
    paths = {name.upper(): str(tmp_path / name) for name in ("empty", "binary", "short", "other")}
    paths["TEXT"] = str(files.text)
    capsys.readouterr()
    assert main(["evaluate", str(files.pruned), *(paths.get(option, option) for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tokens_that_the_model_does_not_have_are_refused(files):
    config = {**files.model.config.to_dict(), "vocab_size": 100}
    small = type(files.model)(type(files.model.config).from_dict(config))
    with pytest.raises(ValueError, match=r"has the token \d+, but .* has embeddings of 100 tokens.*--tokenizer"):
        evaluate(small, [files.text], tokenizer=files.tokenizer, seq_len=32, progress=False)


def test_missing_weights_are_refused(files, tmp_path):
    """transformers would go on with random ones."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    files.model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del state[lost]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=lost):
        evaluate(folder, [files.text], tokenizer=files.tokenizer, seq_len=32, progress=False)
    with pytest.raises(ValueError, match=f"lacks 1 of the weights .*{lost}"):
        CausalLM(str(folder))


@pytest.mark.slow
def test_adapters_and_classifiers_are_called_by_their_name(files, tmp_path, monkeypatch):
    """transformers would load an adapter's model with all of it frozen; what is said to do works."""
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    base = CausalLM(files.dense).model
    base.name_or_path = str(files.dense)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ad")
    how = {"text": [files.text], "tokenizer": files.tokenizer, "seq_len": 32, "progress": False}
    message = r"holds an adapter .*AutoPeftModelForCausalLM\.from_pretrained\('.*ad'\)\.merge_and_unload"
    with pytest.raises(ValueError, match=message):
        CausalLM(tmp_path / "ad")
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "ad", **how)
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ad").merge_and_unload()
    merged.save_pretrained(tmp_path / "ad")
    for load in (CausalLM, lambda folder: evaluate(folder, **how)):
        with pytest.raises(ValueError, match="remove the adapter's files"):
            load(tmp_path / "ad")
    monkeypatch.setattr("lightning_prune.checkpoints.sources.check_folder", lambda folder: None)
    with pytest.raises(ValueError, match=r"is an adapter of PEFT\. Merge"):  # as one of the hub
        CausalLM(tmp_path / "ad")
    for file in (tmp_path / "ad").glob("adapter_*"):
        file.unlink()
    assert evaluate(tmp_path / "ad", **how).models[0].texts == evaluate(files.dense, **how).models[0].texts
    config = {"vocab_size": 320, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(**config, intermediate_size=8)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is of a BertForSequenceClassification"):
        evaluate(tmp_path / "bert", **how)


def test_infinite_perplexity_is_valid_json_and_a_cell():
    text = TextResult("t", "", math.inf, math.inf, 5, 4, 4, 1)
    model = ModelResult("m", "model", 10, 8, 2, None, "float32", "", [text])
    results = EvaluationResults([model], {}, {}, "cpu", 1.0).to_dict()
    json.loads(json.dumps(results), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "| t | 5 | inf |" in evaluation_tables(results)[0].markdown()
    with pytest.raises(ValueError, match="kind='x'"):
        evaluation_tables({"kind": "x"})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.md"
    file.write_text("old")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*a.md'"):
        replace_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_outputs([str(tmp_path / "b.json")])


def test_no_file_but_older_results_is_written_over(tmp_path):
    names = [str(tmp_path / "results.json"), str(tmp_path / "results.md")]
    for _ in range(2):
        write_results(check_outputs(names), EvaluationResults([], {}, {}, "cpu", 1.0).to_dict(), "Evaluate model", [])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "README.md").write_text("# My model")
    for name in ("config.json", "README.md"):
        with pytest.raises(ValueError, match=rf"output='.*{name}' is there, and holds other things than results"):
            check_outputs([names[0], str(tmp_path / name)])


@pytest.mark.slow
def test_perplexity_alone_needs_no_lm_eval(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert (
        evaluate(files.pruned, [files.text], seq_len=32, max_windows=2, progress=False).models[0].texts[0].windows == 2
    )
