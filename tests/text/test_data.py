"""Blocks of text: exact packing, held-out shares, caching, and every error."""

import json
from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
from measured_models import put_first
from tokenizers.processors import TemplateProcessing

from lightning_prune.checkpoints.sources import first_token, load_tokenizer, trained_tokenizer
from lightning_prune.text.data import EMBEDDED, TextDataModule, pack, tokenize

NOVEL = EMBEDDED["austen"].read_text(encoding="utf-8")
CHAPTERS = NOVEL.split("\n\nChapter ")[1:]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache):
    return trained_tokenizer(CHAPTERS[:10], 400, cache / "tokenizers")


@pytest.fixture
def chapters(tmp_path):
    """A folder with three chapters, one file each."""
    folder = tmp_path / "chapters"
    folder.mkdir()
    for i, chapter in enumerate(CHAPTERS[:3]):
        (folder / f"{i}.txt").write_text(chapter, encoding="utf-8")
    return folder


def data_module(cache, source="austen", **kwargs):
    return TextDataModule(
        source, **{"vocab_size": 400, "block_size": 64, "batch_size": 4, "cache_dir": str(cache), **kwargs}
    )


def stream_of(blocks):
    return list(chain.from_iterable(blocks["input_ids"]))


# ---- embedded text


def test_embedded_text_is_the_whole_novel():
    assert NOVEL.startswith("PRIDE AND PREJUDICE\n\nBy Jane Austen\n\nChapter 1\n\nIt is a truth universally")
    assert NOVEL.endswith("had been the means of uniting them.\n")
    assert len(CHAPTERS) == 61
    assert 500_000 < len(NOVEL) < 800_000
    assert "Gutenberg" not in NOVEL
    assert "_" not in NOVEL
    assert all(line.strip() == line for line in NOVEL.split("\n"))


# ---- tokenizer


def test_trained_tokenizer_spells_any_text(tokenizer):
    text = 'Elizabeth said, "Überraschung ½ 好"\n\tindeed'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 400
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_trained_tokenizer_is_deterministic_and_cached(tokenizer, cache, tmp_path):
    again = trained_tokenizer(CHAPTERS[:10], 400, tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    (folder,) = tmp_path.iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    trained_tokenizer(CHAPTERS[:10], 400, tmp_path)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    trained_tokenizer(CHAPTERS[:9], 400, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_tokenizer_from_folder_and_json(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "folder")
    for source in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json"):
        loaded = load_tokenizer(str(source))
        held = TextDataModule(tokenizer=source, cache_dir=tmp_path).hparams
        assert (held["tokenizer"], held["cache_dir"]) == (str(source), str(tmp_path))  # names, which checkpoints keep
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.eos_token == "<|endoftext|>"
        assert loaded.name_or_path == str(source)


def test_tokenizer_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 is too small"):
        trained_tokenizer(["text"], 100, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer='./nowhere' is not an existing"):
        load_tokenizer("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer='nowhere.json'"):
        load_tokenizer("nowhere.json")
    tokenizer.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="eos_token='<end>' is not in the vocabulary"):
        load_tokenizer(str(tmp_path / "folder"), eos_token="<end>")
    file = tmp_path / "folder" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|endoftext|>", "<stop>"), encoding="utf-8")
    with pytest.raises(ValueError, match="declares no end-of-text token"):
        load_tokenizer(str(file))
    assert load_tokenizer(str(file), eos_token="<stop>").eos_token_id == 0
    with pytest.raises(ValueError, match=r"only \.gguf files are loaded directly"):
        load_tokenizer(str(EMBEDDED["austen"]))


def test_the_token_before_every_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert first_token(tokenizer) is None
    for template, expected in (("begin $A", 7), ("begin $A end", 7), ("$A end", None)):
        other = load_tokenizer(str(tmp_path))
        special = [("begin", 7), ("end", 8)]
        other.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        assert first_token(other) == expected


# ---- packing


@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_begin_as_the_tokenizer_begins_texts(tokenizer, chapters, cache, tmp_path, streaming):
    tokenizer.save_pretrained(tmp_path / "plain")
    put_first(load_tokenizer(str(tmp_path / "plain")), 7).save_pretrained(tmp_path / "begun")
    how = {"streaming": streaming, "validation_share": 0.0, "batch_size": 1}
    if not streaming:
        how["keep_last"] = True
    # What is streamed is shuffled; of one document the order is known.
    text = str(chapters / "0.txt")
    data = data_module(cache, text, tokenizer=str(tmp_path / "begun"), **how)
    data.setup("fit")
    blocks = [batch["input_ids"][0].tolist() for batch in data.train_dataloader()]
    if not streaming:
        blocks = data.train_dataset["input_ids"][:]
    expected = [*tokenizer(CHAPTERS[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert {block[0] for block in blocks} == {7}
    assert {len(block) for block in blocks[:-1]} == {64}
    found = list(chain.from_iterable(block[1:] for block in blocks))
    whole = len(expected) if not streaming else len(expected) // 63 * 63
    assert found == expected[:whole]


def test_a_rest_of_one_token_is_predicted_from_the_first():
    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]})
    assert pack(tokens, 3, keep_last=True, begin=9)["input_ids"][:] == [[9, 1, 2], [9, 3, 4], [9, 5]]
    assert pack(tokens, 3, begin=9)["input_ids"][:] == [[9, 1, 2], [9, 3, 4]]
    with pytest.raises(ValueError, match="has 5 tokens, fewer than one block of block_size=7"):
        pack(tokens, 7, begin=9)
    assert pack(tokens, 6, begin=9)["input_ids"][:] == [[9, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_blocks_are_the_token_stream(tokenizer, chapters, cache, num_proc):
    documents = datasets.load_dataset(
        "text", data_files=[str(f) for f in sorted(chapters.iterdir())], sample_by="document", split="train"
    )
    expected = []
    for chapter in CHAPTERS[:3]:
        expected += [*tokenizer(chapter, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    tokens = tokenize(documents, tokenizer, num_proc=num_proc)
    assert stream_of(tokens) == expected

    rest = len(expected) % 50
    assert rest > 1
    dropped = pack(tokens, 50)
    assert stream_of(dropped) == expected[:-rest]
    assert {len(ids) for ids in dropped["input_ids"]} == {50}
    kept = pack(tokens, 50, keep_last=True)
    assert stream_of(kept) == expected
    assert len(kept["input_ids"][-1]) == rest


def test_a_rest_of_one_token_predicts_nothing_and_is_dropped():
    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7]]})
    assert pack(tokens, 3, keep_last=True)["input_ids"][:] == [[1, 2, 3], [4, 5, 6]]


def test_batches(cache, chapters):
    data = data_module(cache, str(chapters))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (4, 64)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()
    first = next(iter(data.val_dataloader()))["input_ids"][0].tolist()
    assert first == data.val_dataset[0]["input_ids"]


def test_last_block_is_padded(cache, chapters):
    data = data_module(cache, str(chapters), keep_last=True, validation_share=0, batch_size=1000)
    data.setup("fit")
    last = len(data.train_dataset[-1]["input_ids"])
    assert last < 64
    batch = next(iter(data.train_dataloader()))
    row = batch["attention_mask"].sum(1).argmin()
    assert batch["attention_mask"][row].tolist() == [1] * last + [0] * (64 - last)
    assert (batch["labels"][row, last:] == -100).all()
    assert torch.equal(batch["labels"][row, :last], batch["input_ids"][row, :last])


# ---- splits and determinism


@pytest.mark.slow
def test_held_out_share_is_the_end_of_the_text(cache):
    data = data_module(cache, validation_share=0.1)
    data.setup("fit")
    train, held_out = stream_of(data.train_dataset), stream_of(data.val_dataset)
    assert len(held_out) / (len(train) + len(held_out)) == pytest.approx(0.1, abs=0.001)
    text = data.tokenizer.decode(train + held_out)
    assert NOVEL.startswith(text.removesuffix("<|endoftext|>"))


def test_tokenizer_does_not_see_the_held_out_share(cache):
    marker = " Zyxwvut"
    text = CHAPTERS[0] * 5 + marker * 200
    source = cache / "marked.txt"
    source.write_text(text, encoding="utf-8")
    blind = data_module(cache, str(source), validation_share=len(marker) * 200 / len(text) + 0.01)
    seeing = data_module(cache, str(source), validation_share=0)
    ids = [len(data.tokenizer(marker)["input_ids"]) for data in (blind, seeing)]
    assert ids[0] > ids[1] == 1


def test_validation_and_test_files(cache, chapters):
    paths = [str(chapters / f"{i}.txt") for i in range(3)]
    data = data_module(cache, paths[0], validation=paths[1], test=paths[2:])
    data.setup("fit")
    with pytest.raises(RuntimeError, match="test_dataset does not exist"):
        _ = data.test_dataset
    data.setup("test")
    for blocks, chapter in zip((data.train_dataset, data.val_dataset, data.test_dataset), CHAPTERS, strict=False):
        text = data.tokenizer.decode(stream_of(blocks)).removesuffix("<|endoftext|>")
        assert chapter.startswith(text)
        assert len(text) > 1000
    assert len(list(data.test_dataloader())) > 0


def test_no_validation(cache, chapters):
    data = data_module(cache, str(chapters), validation_share=0)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_order_depends_on_the_seed_only(cache, chapters):
    def order(seed):
        data = data_module(cache, str(chapters), seed=seed)
        data.setup("fit")
        return torch.cat([batch["input_ids"] for batch in data.train_dataloader()])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_second_run_uses_the_cache(tmp_path, chapters, monkeypatch):
    first = data_module(tmp_path / "cache", str(chapters))
    first.prepare_data()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert files

    def fail(*args, **kwargs):
        raise AssertionError("tokenized again")

    monkeypatch.setattr("lightning_prune.text.sequences._encode", fail)
    monkeypatch.setattr("lightning_prune.text.sequences._cut", fail)
    second = data_module(tmp_path / "cache", str(chapters))
    second.setup("fit")
    assert second.train_dataset["input_ids"][:] == first.train_dataset["input_ids"][:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == files


# ---- file kinds


def write_jsonl(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_every_file_kind_gives_the_same_blocks(cache, chapters, tmp_path, kind):
    rows = [{"story": chapter, "number": i} for i, chapter in enumerate(CHAPTERS[:3])]
    file = tmp_path / f"rows.{kind}"
    if kind == "txt":
        file = chapters
    elif kind == "jsonl":
        write_jsonl(file, rows)
    elif kind == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    field = "text" if kind == "txt" else "story"
    data = data_module(cache, str(file), text_field=field)
    reference = data_module(cache, str(chapters))
    data.setup("fit")
    reference.setup("fit")
    assert stream_of(data.train_dataset) == stream_of(reference.train_dataset)
    assert stream_of(data.val_dataset) == stream_of(reference.val_dataset)


def test_paragraphs_and_lines_as_documents(cache, chapters):
    counts = {}
    for sample_by in ("document", "paragraph", "line"):
        data = data_module(cache, str(chapters), sample_by=sample_by, validation_share=0)
        data.setup("fit")
        counts[sample_by] = stream_of(data.train_dataset).count(data.tokenizer.eos_token_id)
    paragraphs = sum(bool(p.strip()) for chapter in CHAPTERS[:3] for p in chapter.split("\n\n"))
    assert counts["document"] <= 3 < counts["paragraph"] <= paragraphs
    # one paragraph a line in this text; a dropped rest may hold the last
    assert abs(counts["line"] - counts["paragraph"]) <= 3


# ---- errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_size": 1}, "block_size=1 must be a whole number of at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be a whole number of at least 0"),
        ({"num_proc": 0}, "num_proc=0 must be a whole number of at least 1"),
        ({"validation_share": 1.0}, "validation_share=1.0 must lie in"),
        ({"sample_by": "word"}, "sample_by='word' is not known"),
        ({"source": []}, "source is empty"),
    ],
)
def test_argument_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**kwargs)


@pytest.mark.parametrize("below", ["", "inside/of/it"])
@pytest.mark.parametrize("how", [{}, {"streaming": True}])
def test_a_cache_that_cannot_be_used_is_named(chapters, tmp_path, below, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / "file" / below
    more = {"tokenizer": "unread"} if how else {}
    data = data_module(place, str(chapters), **more, **how)
    with pytest.raises(ValueError, match=f"cache_dir='{place}' cannot be used .*choose a folder"):
        data.setup("fit")
    if not how:
        with pytest.raises(ValueError, match=r"cache_dir=.* cannot be used"):
            _ = data.tokenizer
    with pytest.raises(ValueError, match="cache_dir='~nobody_here/x' begins with the home"):
        data_module("~nobody_here/x", str(chapters), **more, **how).setup("fit")
    assert not Path("~nobody_here").exists()


def test_source_errors(cache, chapters, tmp_path):
    def setup(source, **kwargs):
        data_module(cache, source, **kwargs).setup("fit")

    with pytest.raises(FileNotFoundError, match=r"source='./missing.txt' is not an existing"):
        setup("./missing.txt")
    with pytest.raises(FileNotFoundError, match="validation='validation' is not an existing"):
        setup(str(chapters / "0.txt"), validation="validation")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        setup(str(tmp_path / "empty.txt"))
    (tmp_path / "blank.txt").write_text(" \n\n ", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text"):
        setup(str(tmp_path / "blank.txt"))
    (tmp_path / "story.docx").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown extension '.docx'"):
        setup(str(tmp_path / "story.docx"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder without \.txt"):
        setup(str(tmp_path / "folder"))
    write_jsonl(tmp_path / "rows.jsonl", [{"story": "Once", "number": 1}])
    with pytest.raises(ValueError, match=r"text_field='text' is not in .*'story', 'number'"):
        setup(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"text_field='number' .* not text"):
        setup(str(tmp_path / "rows.jsonl"), text_field="number")
    (tmp_path / "short.txt").write_text("It is a truth.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mixes files of the kinds \['.jsonl', '.txt'\]"):
        setup([str(tmp_path / "rows.jsonl"), str(tmp_path / "short.txt")])
    with pytest.raises(ValueError, match=r"The text has \d+ tokens, fewer than one block of block_size=64"):
        setup(str(tmp_path / "short.txt"))
    (tmp_path / "one.txt").write_text(CHAPTERS[0][:400], encoding="utf-8")
    with pytest.raises(ValueError, match=r"The text has 1 block\(s\) or conversation\(s\), too few"):
        setup(str(tmp_path / "one.txt"), block_size=100)


def test_order_of_use_errors(cache):
    data = data_module(cache)
    with pytest.raises(RuntimeError, match="train_dataset does not exist yet"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="There is no test text"):
        data.test_dataloader()
