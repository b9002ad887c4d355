"""Conversations: tokens and labels against lists written by hand, every refusal, and calibration on padded batches."""

import json
from itertools import accumulate

import datasets
import lightning as L
import naive
import numpy as np
import pytest
import torch
from tiny import TINY
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_prune import CausalLM, WeightPruning
from lightning_prune.callbacks.calibration_data import calibration_loss
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.targets import find_targets
from lightning_prune.text.chat import assistant_spans, checked_messages, label_tokens, tokenize_conversations
from lightning_prune.text.data import EMBEDDED, TextDataModule

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# One token a word; the end-of-turn token (2) is also the one that pads, as in SmolLM2-Instruct.
WORDS = ["<unk>", "<s>", "<end>", "<system>", "<user>", "<assistant>", "<tool>"]
WORDS += ["be", "kind", "who", "is", "she", "elizabeth", "and", "he", "darcy", "</think>"]
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ ' <' + m['role'] + '> ' + m['content'] + ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
TALKS = [
    [("system", "be kind"), ("user", "who is she"), ("assistant", "elizabeth"), ("user", "and he"),
     ("assistant", "is darcy")],
    [("user", "who"), ("assistant", "he")],
    [("user", "is he kind"), ("assistant", "he is"), ("tool", "kind"), ("assistant", "kind")],
]  # fmt: skip
IDS = [
    [1, 3, 7, 8, 2, 4, 9, 10, 11, 2, 5, 12, 2, 4, 13, 14, 2, 5, 10, 15, 2],
    [1, 4, 9, 2, 5, 14, 2],
    [1, 4, 10, 14, 8, 2, 5, 14, 10, 2, 6, 8, 2, 5, 8, 2],
]
_ = -100  # not predicted
LABELS = [
    [_, _, _, _, _, _, _, _, _, _, _, 12, 2, _, _, _, _, _, 10, 15, 2],
    [_, _, _, _, _, 14, 2],
    [_, _, _, _, _, _, _, 14, 10, 2, _, _, _, _, 8, 2],
]


def messages(talk):
    return [{"role": role, "content": content} for role, content in talk]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def word_tokenizer(template=TEMPLATE):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<end>", pad_token="<end>"
    )
    wrapped.chat_template = template
    return wrapped


@pytest.fixture
def chats(tmp_path):
    """A file with the three conversations, and a folder with the tokenizer."""
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return write(tmp_path / "chats.jsonl", [{"messages": messages(talk)} for talk in TALKS]), tmp_path


def data_module(chats, **kwargs):
    file, folder = chats
    options = {"tokenizer": str(folder / "tokenizer"), "cache_dir": str(folder / "cache"), "block_size": 64}
    return TextDataModule(
        file, **{**options, "batch_size": 3, "validation": file, "messages_field": "messages", **kwargs}
    )


def ready(chats, **kwargs):
    data = data_module(chats, **kwargs)
    data.setup("fit")
    return data


def encoded(talk, tokenizer, **kwargs):
    """Tokens and labels of one conversation."""
    rows = datasets.Dataset.from_dict({"messages": [messages(talk)]})
    return tokenize_conversations(rows, tokenizer, **kwargs).dataset[0]


# ---- tokens and labels


def test_batch_is_the_one_written_by_hand(chats):
    (batch,) = ready(chats).val_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.dtype == torch.int64 and value.shape == (3, 21) for value in batch.values())
    for row, (ids, labels) in enumerate(zip(IDS, LABELS, strict=True)):
        padding = 21 - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [2] * padding
        assert batch["labels"][row].tolist() == labels + [-100] * padding
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * padding


def test_training_batches_hold_every_conversation_once(chats):
    found = [tuple(row) for batch in ready(chats, batch_size=1).train_dataloader() for row in batch["labels"].tolist()]
    assert sorted(found) == sorted(map(tuple, LABELS))


def test_train_on_all(chats):
    data = ready(chats, train_on="all")
    assert [row["input_ids"] for row in data.val_dataset] == IDS
    assert [row["labels"] for row in data.val_dataset] == IDS


def test_generation_marks_of_the_template_are_not_trusted():
    everything = "{% generation %}" + TEMPLATE + "{% endgeneration %}"
    assert encoded(TALKS[0], word_tokenizer(everything))["labels"] == LABELS[0]


def test_a_template_without_generation_prompt_trains_the_header_too():
    plain = TEMPLATE.split("{% if add")[0]
    assert encoded(TALKS[1], word_tokenizer(plain))["labels"] == [_, _, _, _, 5, 14, 2]


ANSWERS = ["It is a truth universally acknowledged.", "\n\nIndeed — 好, ½ of it! ", " \n", "", "x<|endoftext|>y"]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level BPE that knows two line ends as one token."""
    text = EMBEDDED["austen"].read_text(encoding="utf-8")[:30_000].replace("\n\n", "\n\n\n")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def test_byte_level_labels_by_counting_bytes(byte_tokenizer):
    """Independent of offsets: a byte-level token spells one byte a character, unless it is a special token."""
    special = set(byte_tokenizer.all_special_tokens)
    merged = 0
    for answer in ANSWERS:
        talk = [("user", "Who?\n"), ("assistant", answer), ("user", "好"), ("assistant", "No.")]
        row = encoded(talk, byte_tokenizer)
        whole = byte_tokenizer.apply_chat_template(messages(talk), return_dict=True)["input_ids"]
        assert row["input_ids"] == whole
        tokens = byte_tokenizer.convert_ids_to_tokens(whole)
        ends = list(accumulate(len(token) for token in tokens))
        before = b"<|im_start|>user\nWho?\n<|im_end|>\n<|im_start|>assistant\n"
        first = len(before), len(before) + len(answer.encode()) + len("<|im_end|>\n")
        between = "<|im_start|>user\n好<|im_end|>\n<|im_start|>assistant\n".encode()
        second = first[1] + len(between), first[1] + len(between) + len("No.<|im_end|>\n")
        assert ends[-1] == second[1]
        expected = [
            token_id if any(start < end <= stop for start, stop in (first, second)) else -100
            for token_id, end in zip(whole, ends, strict=True)
        ]
        assert row["labels"] == expected
        merged += any(
            end > first[0] > end - len(token) for token, end in zip(tokens, ends, strict=True) if token not in special
        )
    assert merged  # one answer begins with a token that the prompt's end is part of


def test_spans_and_labels_alone():
    assert label_tokens([5, 6, 7], [(0, 1), (1, 2), (2, 3)], []) == [-100] * 3
    assert label_tokens([], [], [(0, 3)]) == []

    def render(talk, prompt):
        return "".join(f"[{m['role']}]{m['content']}" for m in talk) + "[assistant]" * prompt

    text, spans = assistant_spans(messages([("user", "a"), ("assistant", "b"), ("assistant", "cd")]), render)
    assert [text[start:stop] for start, stop in spans] == ["b", "cd"]


def test_keys_that_are_none_are_left_out():
    message = {"role": "user", "content": "a"}
    assert checked_messages([message | {"tool_calls": None}]) == [message]


# ---- long conversations


def test_long_conversations_are_cut_and_empty_ones_dropped(chats):
    """After 11 tokens the first has no assistant's token left; the last is cut within the answer."""
    with pytest.warns(UserWarning, match="of 3 conversations 2 are longer than block_size=11 tokens .* and 1 without"):
        data = ready(chats, block_size=11)
    assert [row["input_ids"] for row in data.val_dataset] == [IDS[1], IDS[2][:11]]
    assert [row["labels"] for row in data.val_dataset] == [LABELS[1], LABELS[2][:11]]


def test_nothing_is_warned_of_when_nothing_is_cut(chats, recwarn):
    ready(chats, block_size=21)
    assert not [warning for warning in recwarn if "conversations" in str(warning.message)]


def test_no_conversation_left(chats):
    with pytest.raises(ValueError, match=r"No conversation of source=.* within block_size=5 tokens"):
        ready(chats, block_size=5)
    silent = write(chats[1] / "silent.jsonl", [{"messages": messages([("user", "who")])}])
    with pytest.raises(ValueError, match="data in which the assistant speaks"):
        ready((silent, chats[1]))


def test_a_label_at_the_first_token_is_none(chats):
    """Nothing precedes the first token, so it is never predicted."""
    header = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    talk = [("user", ""), ("assistant", "he")]
    with pytest.raises(ValueError, match="has a token to predict"):
        encoded(talk, word_tokenizer(header.replace(" + ' '", "")))


# ---- templates that do not fit


def test_templates_whose_prefixes_are_no_prefixes():
    forgetful = TEMPLATE.replace(
        "m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split(' ')[-1])"
    )
    talk = [("user", "who"), ("assistant", "he is"), ("user", "and"), ("assistant", "she")]
    with pytest.raises(
        ValueError, match=r"row 1 of the data, field 'messages': .* the first 1 message\(s\) and the ans"
    ):
        encoded(talk, word_tokenizer(forgetful))
    assert encoded(talk[:2], word_tokenizer(forgetful))["labels"] == [_, _, _, _, _, 14, 10, 2]
    thinking = TEMPLATE.replace("' <assistant>'", "' <assistant> </think>'")
    with pytest.raises(
        ValueError, match=r"with the generation prompt differently .* at character 33, '</think>' against"
    ):
        encoded(talk, word_tokenizer(thinking))
    assert encoded(talk, word_tokenizer(thinking), train_on="all")["labels"][0] == 1


def test_template_refuses_a_role():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    assert encoded(TALKS[1], word_tokenizer(strict))["labels"] == LABELS[1]
    with pytest.raises(ValueError, match=r"row 1 .* refuses messages of the roles system, user, .*: no system"):
        encoded(TALKS[0], word_tokenizer(strict))


def test_the_assistant_begins():
    talk = [("assistant", "who"), ("user", "he")]
    with pytest.raises(ValueError, match="message 1 is the assistant's, with nothing to answer"):
        encoded(talk, word_tokenizer())
    assert encoded(talk, word_tokenizer(), train_on="all")["labels"] == [1, 5, 9, 2, 4, 14, 2]


# ---- malformed data


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "who"}, "None is no list of messages"),
        ({"messages": "who"}, "'who' is no list of messages"),
        ({"messages": []}, r"\[\] is no list of messages"),
        ({"messages": ["who"]}, "message 1 is 'who', not"),
        ({"messages": [{"content": "who"}]}, "message 1 has the role None. Use one of 'system', 'user', 'assistant'"),
        ({"messages": [{"role": "human", "content": "who"}]}, "message 1 has the role 'human'"),
        ({"messages": [{"role": "user"}]}, "message 1 has the content None, which is no text"),
        ({"messages": [{"role": "user", "content": ["who"]}]}, r"message 1 has the content \['who'\]"),
        ({"messages": [{"role": "user", "content": "who", "weight": 0}]}, r"message 1 has the fields \['weight'\]"),
    ],
)
def test_malformed_rows(chats, row, message):
    good = {"messages": messages(TALKS[1])}
    file = write(chats[1] / "bad.jsonl", [good, good, row])
    with pytest.raises(ValueError, match=rf"row 3 of source='.*bad.jsonl', field 'messages': {message}"):
        ready((file, chats[1]))


def test_files_that_hold_something_else(chats):
    folder = chats[1]
    broken = folder / "broken.jsonl"
    broken.write_text(json.dumps({"messages": messages(TALKS[1])}) + "\n{oops\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"source=.*line 2 of .*broken.jsonl is no JSON"):
        ready((str(broken), folder))
    with pytest.raises(ValueError, match=r"messages_field='messages' is not in source='austen', .* \['text'\]"):
        ready(("austen", folder))


def test_tokenizer_without_template(chats):
    word_tokenizer(None).save_pretrained(chats[1] / "plain")
    with pytest.raises(ValueError, match=r"tokenizer='.*plain' has no chat template"):
        ready(chats, tokenizer=str(chats[1] / "plain"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokenizer": "train"}, "messages_field='messages' with tokenizer='train'"),
        ({"streaming": True}, "streaming=True and keep_last=False: name a tokenizer"),
        ({"keep_last": True}, "keep_last=True: name a tokenizer"),
        ({"train_on": "user"}, "train_on='user' is not known. Use 'assistant' or 'all'"),
    ],
)
def test_argument_errors(chats, kwargs, message):
    with pytest.raises(ValueError, match=message):
        data_module(chats, **kwargs)


# ---- files, splits, cache


def test_parquet_processes_and_held_out_share(chats):
    file = str(chats[1] / "chats.parquet")
    datasets.Dataset.from_list([{"talk": messages(talk), "source": "hand"} for talk in TALKS]).to_parquet(file)
    data = ready((file, chats[1]), messages_field="talk", validation=None, validation_share=0.3, num_proc=2)
    assert [row["labels"] for row in data.train_dataset] == LABELS[:2]
    assert [row["labels"] for row in data.val_dataset] == LABELS[2:]


def test_cache_depends_on_template_length_and_train_on(chats, monkeypatch):
    first = ready(chats)
    encode = "lightning_prune.text.chat._encode_rows"

    def fail(*args, **kwargs):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(encode, fail)
        assert ready(chats).train_dataset[:] == first.train_dataset[:]
        for kwargs in ({"train_on": "all"}, {"block_size": 30}):
            with pytest.raises(AssertionError, match="tokenized again"):
                ready(chats, **kwargs)
    word_tokenizer(TEMPLATE.replace("<s>", "")).save_pretrained(chats[1] / "tokenizer")
    assert ready(chats).train_dataset[1]["input_ids"] == IDS[1][1:]


# ---- training and calibration


@pytest.fixture
def module(chats):
    torch.manual_seed(0)
    return CausalLM(config={**TINY, "initializer_range": 0.1}, tokenizer=str(chats[1] / "tokenizer"))


def hand_built_statistics(model):
    samples = [
        {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        for ids, labels in zip(IDS, LABELS, strict=True)
    ]
    names = [target.name for target in find_targets(model)]
    layers = {name: name.removesuffix(".weight") for name in names}
    return naive.statistics(model, samples, layers, lambda module, sample: naive.next_token_loss(module.model, sample))


def test_losses_of_a_padded_batch_in_float64(chats, module):
    (batch,) = ready(chats).val_dataloader()
    reference = module.double().requires_grad_(False)
    expected = [
        float(naive.next_token_loss(reference.model, {k: torch.tensor([v]) for k, v in pair.items()}))
        for pair in ({"input_ids": i, "labels": j} for i, j in zip(IDS, LABELS, strict=True))
    ]
    assert module.calibration_loss(batch).tolist() == pytest.approx(expected, rel=1e-9)
    counts = [sum(label != -100 for label in labels) for labels in LABELS]
    losses, tokens = module._token_losses(batch)
    assert int(tokens) == sum(counts)
    assert float(losses.sum()) == pytest.approx(np.dot(expected, counts), rel=1e-9)


def test_calibration_statistics_of_a_padded_batch(chats, module):
    wanted = ("input_norm", "output_grad_norm", "gradient_l1")
    found = collect(
        module,
        ready(chats).train_dataloader(),
        find_targets(module),
        wanted,
        num_samples=3,
        loss_fn=calibration_loss(module),
        progress=False,
    )
    for name, expected in hand_built_statistics(module).items():
        for key in wanted:
            assert getattr(found[name], key).double().numpy() == pytest.approx(expected[key], rel=1e-3, abs=1e-6)


def test_weight_pruning_calibrates_on_the_assistants_tokens(chats, module):
    weights = {t.name: t.weight.detach().double().numpy().copy() for t in find_targets(module)}
    stats = hand_built_statistics(module)
    callback = WeightPruning(score="gradient", sparsity=0.5, num_samples=3, progress=False)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data_module(chats, batch_size=2))
    for name, mask in callback.masks.items():
        values = naive.score("gradient", weights[name], stats[name])
        expected = naive.masks({"w": values}, 0.5, "row")["w"]
        assert naive.near_ties(values, expected, mask.numpy(), "row", 1e-3), name
        assert (mask.numpy() != expected).mean() < 1e-2, name
    assert len(callback.masks) == 14
