"""Accuracies against log-probabilities that are added up here, in float64."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from measured_models import PAIRS, make_models, write_pairs
from transformers import AutoModelForCausalLM

from lightning_prune.evaluation.tasks import _mean, _task_manager, read_tasks, zero_shot

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(files):
    return AutoModelForCausalLM.from_pretrained(files.dense).eval()


def log_probability(model, tokenizer, query, text):
    """Sum of the log-probabilities of the tokens of `text` after the query, or after the first token of all."""
    whole = tokenizer(f"{query} {text}", add_special_tokens=False)["input_ids"]
    context = tokenizer(query, add_special_tokens=False)["input_ids"] if query else [tokenizer.bos_token_id]
    ids = whole if query else context + whole
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    total = 0.0
    for position in range(len(context), len(ids)):
        row = logits[position - 1]
        total += float(row[ids[position]] - row.exp().sum().log())
    return total


@pytest.mark.parametrize("batch_size", [1, 5])
def test_minimal_pairs_are_those_of_log_probabilities_added_up(batch_size, files, model):
    double = copy.deepcopy(model).double()
    right = [
        log_probability(double, files.tokenizer, "", good) > log_probability(double, files.tokenizer, "", bad)
        for good, bad in PAIRS
    ]
    assert 0 < sum(right) < len(right)  # else the test would not tell right from wrong
    found = zero_shot(model, files.tokenizer, [f"blimp:{files.pairs}"], batch_size=batch_size, progress=False)
    one, two = sum(right[:4]) / 4, sum(right[4:]) / 3
    assert [(r.task, r.metric, r.samples, r.group) for r in found] == [
        ("agreement", "acc", 4, False),
        ("other", "acc", 3, False),
        ("pairs", "acc", 7, True),
    ]
    assert [r.value for r in found] == pytest.approx([one, two, (one + two) / 2], abs=1e-12)
    # Standard errors of means of zeros and ones (n - 1), and of the mean of two independent ones.
    errors = [(p * (1 - p) / (n - 1)) ** 0.5 for p, n in ((one, 4), (two, 3))]
    errors.append((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert [r.stderr for r in found] == pytest.approx(errors, abs=1e-12)


def test_multiple_choice(files, model, tmp_path):
    samples = [
        ("It is a truth", ["universally acknowledged", "that"], 0),
        ("Mr. Bennet was", ["so odd a mixture", "never", "his wife of twenty"], 2),
        ("The carriage", ["came to the door", "is"], 1),
        ("She could not", ["see him", "have been more pleased with what he said"], 0),
    ]
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps({"query": q, "choices": c, "gold": g}) + "\n" for q, c, g in samples))
    double = copy.deepcopy(model).double()
    acc = acc_norm = 0
    for query, choices, gold in samples:
        scores = [log_probability(double, files.tokenizer, query, choice) for choice in choices]
        acc += max(range(len(choices)), key=scores.__getitem__) == gold
        acc_norm += max(range(len(choices)), key=lambda i: scores[i] / len(choices[i])) == gold
    found = {r.metric: r.value for r in zero_shot(model, files.tokenizer, [str(file)], progress=False)}
    assert found == {"acc": acc / 4, "acc_norm": acc_norm / 4}


def test_a_model_that_knows_nothing_is_right_half_of_the_time(files, model, tmp_path):
    """lm-eval takes the first of equal choices, so it must not always be the good one."""
    blind = copy.deepcopy(model)
    torch.nn.init.zeros_(blind.lm_head.weight)
    same_length = write_pairs(tmp_path / "same.jsonl", [("a b", "b a")] * 10)
    (found,) = zero_shot(blind, files.tokenizer, [str(same_length)], progress=False)
    assert found.value == 0.5


def test_nan_is_no_answer(files, model):
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match=r"14 of 14 log-probabilities are NaN"):
        zero_shot(broken, files.tokenizer, [str(files.pairs)], progress=False)


def test_nothing_is_changed(files, model):
    model.train()
    model.lm_head.eval()
    modes, padding = [m.training for m in model.modules()], files.tokenizer.padding_side
    random = torch.get_rng_state()
    zero_shot(model, files.tokenizer, [str(files.pairs)], limit=2, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert files.tokenizer.padding_side == padding
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()


def test_limit_takes_the_first_samples(files, model):
    found = zero_shot(model, files.tokenizer, [str(files.pairs)], limit=2, progress=False)
    assert [r.samples for r in found] == [2, 2, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must have non-empty texts"),
        ('{"sentence_good": "a", "sentence_bad": ""}', "line 2 must have"),
        ('{"sentence_good": "a", "sentence_bad": 3}', "line 2 must have"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2 must have"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2 must have"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "line 2 must have"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1}', "mixes minimal pairs and multiple choice"),
    ],
)
def test_files_that_are_no_tasks(line, message, tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_tasks([str(file)])


def test_specifications_that_are_refused(files, model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "task.yaml").write_text("task: !function evil.run\n")
    (tmp_path / "words.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    for spec, message in [
        (tmp_path / "empty", "folder without .jsonl files"),
        (tmp_path / "empty.jsonl", "holds no samples"),
        ("task.yaml", "definitions may name code"),
        ("words.txt", "local tasks are .jsonl files"),  # there: no name of a task, which lm-eval takes long to look up
    ]:
        with pytest.raises(ValueError, match=message):
            read_tasks([str(spec)])
    with pytest.raises(FileNotFoundError, match="tasks="):
        read_tasks(["blimp:/no/such"])
    with pytest.raises(ValueError, match="'agreement' is named twice"):
        read_tasks([str(files.pairs), str(files.pairs / "agreement.jsonl")])
    long = write_pairs(tmp_path / "long.jsonl", [("word " * 100, "a")])
    with pytest.raises(ValueError, match=r"sample 0 has .* more than the 64 the model takes"):
        zero_shot(model, files.tokenizer, [str(long)], progress=False)
    with pytest.raises(ValueError, match="limit=0"):
        zero_shot(model, files.tokenizer, ["blimp"], limit=0)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-prune\[eval\]'"):
        zero_shot(model, files.tokenizer, ["blimp"], progress=False)


@pytest.fixture
def part_of_the_index(monkeypatch):
    """Two folders of lm-eval's own tasks: to read all of its thousands of files takes a quarter of a minute."""
    import lm_eval.tasks

    whole, folder = lm_eval.tasks.TaskManager, Path(lm_eval.tasks.__file__).parent
    own = [str(folder / name) for name in ("blimp", "hellaswag")]
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_defaults: whole(include_path=own if include_defaults else None, include_defaults=False),
    )
    _task_manager.cache_clear()
    yield
    _task_manager.cache_clear()


@pytest.mark.slow
def test_tasks_of_lm_eval_by_name(files, model, part_of_the_index, monkeypatch):
    """The index of its tasks is read; their data would come from the hub."""
    with pytest.raises(ValueError, match="'helaswag' is no task of lm-eval; did you mean 'hellaswag'"):
        zero_shot(model, files.tokenizer, ["helaswag"], progress=False)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match="cannot load the data of blimp_passive_1: no network"):
        zero_shot(model, files.tokenizer, ["blimp_passive_1"], progress=False)


@pytest.mark.slow
def test_our_files_give_what_a_task_of_lm_eval_gives(files, model, part_of_the_index, monkeypatch):
    """lm-eval's own blimp task on the same sentences."""
    import datasets

    rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS]
    own = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: own)
    (theirs,) = zero_shot(model, files.tokenizer, ["blimp_passive_1"], progress=False)
    ours = zero_shot(model, files.tokenizer, [str(files.pairs)], progress=False)
    assert theirs.samples == 7
    assert theirs.value == pytest.approx((4 * ours[0].value + 3 * ours[1].value) / 7)


def test_a_mean_without_all_errors_has_none(files, model):
    found = zero_shot(model, files.tokenizer, [str(files.pairs)], limit=2, progress=False)[:2]
    assert _mean("g", "acc", found).stderr is not None
    assert _mean("g", "acc", [found[0], dataclasses.replace(found[1], stderr=None)]).stderr is None
