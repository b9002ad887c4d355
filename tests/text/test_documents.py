"""Texts as users have them: other encodings, folders of save_to_disk, objects. Read, or refused with the reason."""

from __future__ import annotations

import gzip

import datasets
import pytest
from tiny import TINY

from lightning_prune import CausalLM, TextDataModule
from lightning_prune.evaluation.evaluate import evaluate
from lightning_prune.text.documents import local_documents, quiet_datasets, texts_of

TEXT = "Il \xe9tait une fois. " * 400


def documents(path, cache, **options):
    return local_documents(str(path), "source", "document", str(cache), **options)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("streaming", [False, True])
def test_marked_texts_are_read_as_what_they_are(encoding, streaming, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    rows = documents(tmp_path / "a.txt", tmp_path / "cache", streaming=streaming)
    assert [row["text"] for row in rows] == [TEXT]


def test_a_mark_in_one_of_two_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes(b"plain " + TEXT.encode())
    rows = local_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "source", "document", str(tmp_path))
    assert [row["text"] for row in rows] == [TEXT, "plain " + TEXT]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", TEXT.encode("latin-1"), r"not UTF-8 text \(byte 0xe9 near position 3\).*iconv -f LATIN1"),
        ("a.txt", TEXT.encode("utf-16-le"), r"zero bytes.*iconv -f UTF-16LE"),
        ("a.txt", TEXT.encode("utf-16")[:-1], "not UTF-16|cannot be read"),
        ("a.jsonl", b'\xff\xfe{\x00"\x00', "mark of utf-16.*iconv"),
        ("a.jsonl", '{"text": "\xe9"}\n'.encode("latin-1"), "0xe9"),
        ("a.parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
        ("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0), "must be unpacked"),
        ("a.csv", b"text\nx\n", "unknown extension"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextDataModule(str(tmp_path / name), vocab_size=300, block_size=16, cache_dir=str(tmp_path / "c")).setup("fit")


@pytest.mark.slow
def test_evaluate_reads_a_marked_text_and_refuses_zero_bytes(tmp_path):
    folder = tmp_path / "model"
    module = CausalLM(config=TINY)
    (tmp_path / "train.txt").write_text(TEXT)
    data = TextDataModule(tmp_path / "train.txt", vocab_size=300, block_size=16, cache_dir=str(tmp_path / "c"))
    module.tokenizer = data.tokenizer
    module.save_pretrained(folder)
    found = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
        found.append(evaluate(folder, [tmp_path / "a.txt"], progress=False, max_windows=2).models[0].texts[0])
    assert found[0] == found[1]
    assert found[0].seq_len == TINY["max_position_embeddings"]  # shorter than the default, so that a default run works
    (tmp_path / "a.txt").write_bytes(TEXT.encode("utf-16-le").replace(b"\xe9", b"e"))
    with pytest.raises(ValueError, match="UTF-16"):
        evaluate(folder, [tmp_path / "a.txt"], progress=False)


@pytest.fixture
def saved(tmp_path):
    rows = {"text": ["one " + TEXT, "two " + TEXT], "id": [1, 2]}
    train = datasets.Dataset.from_dict(rows)
    train.save_to_disk(tmp_path / "one")
    held = datasets.Dataset.from_dict({"text": ["held " + TEXT]})
    datasets.DatasetDict({"train": train, "held": held}).save_to_disk(tmp_path / "several")
    return tmp_path


def blocks(data):
    data.setup("fit")
    return [block for dataset in (data.train_dataset, data.val_dataset) for block in dataset["input_ids"]]


def test_folders_of_save_to_disk_give_the_blocks_of_the_text(saved):
    """The same rows as a JSON Lines file, which another reader reads."""
    options = {"vocab_size": 300, "block_size": 16, "cache_dir": str(saved / "c")}
    datasets.load_from_disk(saved / "one").to_json(saved / "rows.jsonl")
    expected = blocks(TextDataModule(str(saved / "rows.jsonl"), **options))
    assert blocks(TextDataModule(str(saved / "one"), **options)) == expected
    assert blocks(TextDataModule(str(saved / "several"), **options)) == expected
    data = TextDataModule(str(saved / "several"), validation="held", **options)
    data.setup("fit")
    assert data.tokenizer.decode(data.val_dataset[0]["input_ids"]).startswith("held Il")


def test_folders_of_save_to_disk_that_do_not_fit(saved):
    options = {"vocab_size": 300, "block_size": 16, "cache_dir": str(saved / "c")}
    with pytest.raises(ValueError, match=r"has the splits \['held', 'train'\], no 'test'"):
        TextDataModule(str(saved / "several"), split="test", **options).setup("fit")
    for source, part in (
        ("one", {"split": "test"}),
        ("several", {"name": "small"}),
        ("rows.txt", {"split": "validation"}),
        ("rows.txt", {"revision": "main", "streaming": True, "tokenizer": "gpt2"}),
    ):
        (saved / "rows.txt").write_text("text " * 99)
        name, value = next(iter(part.items()))
        with pytest.raises(ValueError, match=rf"^{name}='{value}' is of datasets .*{source}.*leave {name} out"):
            TextDataModule(str(saved / source), **options | part).setup("fit")
    with pytest.raises(ValueError, match="pass it alone"):
        TextDataModule([str(saved / "one")], **options).setup("fit")
    (saved / "one" / "state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read as a folder of save_to_disk"):
        TextDataModule(str(saved / "one"), **options).setup("fit")


@pytest.mark.parametrize("argument", ["source", "validation", "test"])
def test_objects_are_refused(argument):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    for value in (rows, rows.to_iterable_dataset(), datasets.DatasetDict({"train": rows}), [rows], 3):
        with pytest.raises(ValueError, match=rf"{argument} is a .*save_to_disk"):
            TextDataModule(**{argument: value})


def test_paths_become_names_that_a_checkpoint_keeps(tmp_path):
    data = TextDataModule(tmp_path / "a.txt", validation=[tmp_path / "b.txt"])
    assert data.hparams["source"] == str(tmp_path / "a.txt")
    assert data.hparams["validation"] == [str(tmp_path / "b.txt")]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_that_the_hub_does_not_have_is_in_the_message(streaming, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'my_text' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    there = r"='my_text' is no folder on this machine, and cannot be had from the hub: Couldn't reach .*Error\)\. Check"
    with pytest.raises(OSError, match=f"^text{there}"):
        next(texts_of("my_text"))
    data = TextDataModule("my_text", tokenizer="gpt2", block_size=16, streaming=streaming)
    with pytest.raises(OSError, match=f"^source{there}"):
        data._streamed_documents("my_text") if streaming else data._rows("my_text", "source")


@pytest.mark.parametrize("disabled", [False, True])
def test_bars_of_datasets_are_as_before_after_a_quiet_block(disabled):
    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()
        with quiet_datasets():
            assert datasets.are_progress_bars_disabled()
        assert datasets.are_progress_bars_disabled() == disabled
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
