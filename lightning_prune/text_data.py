"""Text as blocks of tokens: a LightningDataModule on the datasets library.

The way of the data: documents -> tokens of each document -> one stream with an end-of-text token after every
document -> blocks of equal length -> batches. Documents, tokens and blocks are cached on disk by the datasets
library. Conversations are samples of their own (`lightning_prune.chat_data`).

Letters: B samples, T tokens (block_size).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import lightning as L
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_prune.chat_data import bad_json_line, check_chat_tokenizer, tokenize_conversations
from lightning_prune.losses import IGNORE_INDEX
from lightning_prune.sources import existing_path, looks_like_path
from lightning_prune.text_stream import StreamedBlocks
from lightning_prune.tokenization import load_tokenizer, trained_tokenizer

EMBEDDED = {"austen": Path(__file__).parent / "data" / "austen.txt"}
# extension -> builder of the datasets library
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# part of the cache key: raise it when tokenizing or packing changes
_CACHE_VERSION = 1


class TextDataModule(L.LightningDataModule):
    """Blocks of text for a causal language model.

    A batch is a dict of int64 tensors (B, T): "input_ids" and "labels", the same ids unshifted. With
    `keep_last`, also "attention_mask", and labels are -100 where it is 0.

    The validation blocks come from `validation`, or are the last `validation_share` of the blocks of `source`;
    they share no token with the training blocks.

    With `messages_field` a sample is a conversation, rendered by the tokenizer's chat template and padded to the
    longest of its batch ("attention_mask"). Labels are -100 outside what the assistant says, which includes its
    end-of-turn token. What is longer than `block_size` is cut at its end; where no label is left, the conversation is
    dropped. A warning counts both.

    Args:
        source: "austen" (*Pride and Prejudice*, embedded in the package), local .txt, .jsonl, .json or .parquet
            files or a folder of them, or the name of a dataset on the hub.
        name: Configuration of the hub dataset, e.g. "wikitext-2-raw-v1".
        split: Split of the hub dataset to train on.
        revision: Branch, tag or commit of the hub dataset.
        validation: Validation text: local files, "austen", or a split of the hub dataset `source`.
        test: Test text, likewise.
        validation_share: Share of the blocks held out when `validation` is None, in [0, 1); 0 for no validation.
        text_field: Field or column that holds the text.
        sample_by: What one document is in .txt files: the whole "document", a "paragraph" (separated by blank
            lines) or a "line".
        tokenizer: Hub id, local folder, `.gguf` file, tokenizer.json, or "train": a byte-level BPE trained on
            the training text (not on a held-out share).
        gguf_file: Name of a GGUF file inside the folder or hub repository `tokenizer`.
        eos_token: Token that ends a document; default the one the tokenizer declares.
        vocab_size: Of a trained tokenizer, at least 257.
        block_size: Tokens in a block; of a conversation, at most.
        keep_last: Keep the rest of the stream as a shorter, padded block instead of dropping it.
        batch_size: Blocks in a batch.
        seed: Of the order of the training blocks.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenize. Default none besides this one.
        cache_dir: Where datasets and trained tokenizers are kept. Default the cache of the datasets library.
        streaming: Read, tokenize and pack the training text while it is used, and prepare nothing: for text that is
            larger than a disk. Shuffled within a buffer of documents. Nothing is held out then (name `validation`),
            `max_steps` says when training ends, and a resumed training reads the stream from its beginning.
        messages_field: Field or column that holds conversations, lists of {"role", "content"} (usually "messages"), in
            place of text. The roles are "system", "user", "assistant" and "tool", as far as the template knows them.
        train_on: Of conversations: labels on the "assistant"'s tokens, or on "all".

    Raises:
        ValueError: If an argument is out of range. On `setup`: if the text is empty or too short for the blocks
            asked for, a file has an unknown extension, or the text field is missing; if the tokenizer has no chat
            template, a row is no conversation, or the template does not allow to tell the assistant's tokens.
        FileNotFoundError: If a local file does not exist.

    Example:
        >>> data = TextDataModule("austen", vocab_size=512, block_size=64)  # doctest: +SKIP
        >>> trainer.fit(model, datamodule=data)  # doctest: +SKIP
    """

    def __init__(
        self,
        source: str | list[str] = "austen",
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        validation_share: float = 0.05,
        text_field: str = "text",
        sample_by: Literal["document", "paragraph", "line"] = "document",
        tokenizer: str = "train",
        gguf_file: str | None = None,
        eos_token: str | None = None,
        vocab_size: int = 4096,
        block_size: int = 512,
        keep_last: bool = False,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
        streaming: bool = False,
        messages_field: str | None = None,
        train_on: Literal["assistant", "all"] = "assistant",
    ) -> None:
        super().__init__()
        if messages_field is not None and (tokenizer == "train" or streaming or keep_last):
            raise ValueError(
                f"messages_field={messages_field!r} with tokenizer={tokenizer!r}, streaming={streaming} and "
                f"keep_last={keep_last}: name a tokenizer with a chat template, and leave streaming and keep_last out; "
                "each conversation is a sample of its own."
            )
        if train_on not in ("assistant", "all"):
            raise ValueError(f"train_on={train_on!r} is not known. Use 'assistant' or 'all'.")
        if streaming and (tokenizer == "train" or keep_last):
            raise ValueError(
                f"streaming=True with tokenizer={tokenizer!r} and keep_last={keep_last}: a stream is read once, so "
                "name a tokenizer that exists, and leave keep_last out."
            )
        _check_at_least("block_size", block_size, 2)
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("num_workers", num_workers, 0)
        if num_proc is not None:
            _check_at_least("num_proc", num_proc, 1)
        if not 0 <= validation_share < 1:
            raise ValueError(f"validation_share={validation_share} must lie in [0, 1). Try 0.05.")
        if sample_by not in ("document", "paragraph", "line"):
            raise ValueError(f"sample_by={sample_by!r} is not known. Use 'document', 'paragraph' or 'line'.")
        if not source:
            raise ValueError("source is empty. Pass 'austen', a file, a folder or the name of a hub dataset.")
        self.save_hyperparameters(logger=False)  # the module's own of the same names are logged
        self.block_size = block_size
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._train: datasets.Dataset | None = None
        self._stream: datasets.IterableDataset | None = None
        self._validation: datasets.Dataset | None = None
        self._test: datasets.Dataset | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; trained on first use with `tokenizer="train"`."""
        if self._tokenizer is None:
            hp = self.hparams
            if hp["tokenizer"] == "train":
                self._tokenizer = trained_tokenizer(
                    self._training_text(), hp["vocab_size"], self._cache_dir() / "lightning_prune_tokenizers"
                )
            else:
                self._tokenizer = load_tokenizer(hp["tokenizer"], hp["gguf_file"], hp["eos_token"])
        return self._tokenizer

    @property
    def train_dataset(self) -> datasets.Dataset:
        """Training blocks, each {"input_ids": ids}; call `setup` before."""
        return _prepared(self._train, "train_dataset")

    @property
    def val_dataset(self) -> datasets.Dataset:
        """Validation blocks; call `setup` before."""
        return _prepared(self._validation, "val_dataset")

    @property
    def test_dataset(self) -> datasets.Dataset:
        """Test blocks; call `setup` before, and pass `test`."""
        return _prepared(self._test, "test_dataset")

    def prepare_data(self) -> None:
        """Download, train the tokenizer, tokenize and pack, into the cache; runs on one process of a node."""
        self.setup("all")

    def setup(self, stage: str) -> None:
        """Build the blocks, from the cache if they are there.

        Args:
            stage: "fit", "validate", "test" or "predict" of the Trainer; only "test" needs the test text.
        """
        hp = self.hparams
        if hp["streaming"] and self._stream is None:
            self._stream = self._streamed_documents(hp["source"])
            if hp["validation"] is not None:
                self._validation = self._blocks(hp["validation"], "validation")
            else:
                self._validation = datasets.Dataset.from_dict({"input_ids": []})
        elif self._train is None and not hp["streaming"]:
            blocks = self._blocks(hp["source"], "source")
            if hp["validation"] is not None:
                self._train, self._validation = blocks, self._blocks(hp["validation"], "validation")
            else:
                self._train, self._validation = _hold_out(blocks, hp["validation_share"])
        if self._test is None and hp["test"] is not None and stage in ("test", "all"):
            self._test = self._blocks(hp["test"], "test")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training blocks in an order given by `seed`."""
        if self.hparams["streaming"]:
            return self._streaming_loader()
        order = torch.Generator().manual_seed(self.hparams["seed"])
        return self._loader(self.train_dataset, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of validation blocks in the order of the text; an empty list if nothing is held out."""
        return self._loader(self.val_dataset) if len(self.val_dataset) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of test blocks in the order of the text."""
        if self.hparams["test"] is None:
            raise ValueError("There is no test text. Pass test=, files or a split of the hub dataset.")
        return self._loader(self.test_dataset)

    def _loader(self, blocks: datasets.Dataset, **kwargs: Any) -> DataLoader[Any]:
        hp = self.hparams
        padded = hp["keep_last"] or hp["messages_field"] is not None
        pad_id = self.tokenizer.pad_token_id if padded else None
        if padded and pad_id is None:
            pad_id = self.tokenizer.eos_token_id
        return DataLoader(
            blocks.with_format("numpy"),
            batch_size=hp["batch_size"],
            num_workers=hp["num_workers"],
            persistent_workers=hp["num_workers"] > 0,
            collate_fn=partial(collate, pad_id=pad_id),
            **kwargs,
        )

    def _streaming_loader(self) -> DataLoader[Any]:
        hp = self.hparams
        split = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        blocks = StreamedBlocks(
            _prepared(self._stream, "the stream"),
            self.tokenizer,
            hp["text_field"],
            hp["block_size"],
            seed=hp["seed"],
            **split,
        )
        workers = hp["num_workers"]
        return DataLoader(
            blocks,
            batch_size=hp["batch_size"],
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            drop_last=True,
        )

    def _streamed_documents(self, source: str | list[str]) -> datasets.IterableDataset:
        hp = self.hparams
        if isinstance(source, str) and not _is_local(source):
            documents = datasets.load_dataset(
                source,
                hp["name"],
                split=hp["split"],
                revision=hp["revision"],
                cache_dir=hp["cache_dir"],
                streaming=True,
            )
        else:
            documents = _local_documents(source, "source", hp["sample_by"], hp["cache_dir"], streaming=True)
        columns = documents.column_names
        if columns is not None and hp["text_field"] not in columns:
            raise ValueError(
                f"text_field={hp['text_field']!r} is not in source={source!r}, which has the fields {columns}. Pass "
                "one of them as text_field."
            )
        return documents

    def _cache_dir(self) -> Path:
        return Path(self.hparams["cache_dir"] or datasets.config.HF_DATASETS_CACHE).expanduser()

    def _blocks(self, source: str | list[str], argument: str) -> datasets.Dataset:
        hp = self.hparams
        if hp["messages_field"] is not None:
            return self._conversations(source, argument)
        tokens = tokenize(self._documents(source, argument), self.tokenizer, hp["text_field"], num_proc=hp["num_proc"])
        return pack(tokens, hp["block_size"], keep_last=hp["keep_last"])

    def _conversations(self, source: str | list[str], argument: str) -> datasets.Dataset:
        hp = self.hparams
        check_chat_tokenizer(self.tokenizer)
        dataset, truncated, dropped = tokenize_conversations(
            self._rows(source, argument),
            self.tokenizer,
            hp["messages_field"],
            hp["block_size"],
            hp["train_on"],
            num_proc=hp["num_proc"],
            origin=f"{argument}={source!r}",
        )
        if truncated or dropped:
            rank_zero_warn(
                f"{argument}={source!r}: of {len(dataset) + dropped} conversations {truncated} are longer than "
                f"block_size={hp['block_size']} tokens and were cut, and {dropped} without a token to predict were "
                "dropped."
            )
        return dataset

    def _documents(self, source: str | list[str], argument: str) -> datasets.Dataset:
        return _text_only(self._rows(source, argument), self.hparams["text_field"], source, argument)

    def _rows(self, source: str | list[str], argument: str) -> datasets.Dataset:
        """Local files, or a split of a hub dataset, with all their columns."""
        hp = self.hparams
        on_hub = argument == "source" and isinstance(source, str) and not _is_local(source)
        split_of_hub = argument != "source" and isinstance(source, str) and not _is_local(source)
        if on_hub or (split_of_hub and isinstance(hp["source"], str) and not _is_local(hp["source"])):
            return datasets.load_dataset(
                hp["source"],
                hp["name"],
                split=hp["split"] if on_hub else source,
                revision=hp["revision"],
                cache_dir=hp["cache_dir"],
            )
        return _local_documents(source, argument, hp["sample_by"], hp["cache_dir"])

    def _training_text(self) -> "_TextPrefix":
        """The text of `source` without the characters of a held-out share at its end."""
        hp = self.hparams
        held_out = hp["validation_share"] if hp["validation"] is None else 0.0
        return _TextPrefix(self._documents(hp["source"], "source"), hp["text_field"], 1 - held_out)


def tokenize(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Tokenize documents, an end-of-text token after each, without other special tokens.

    Args:
        documents: A dataset with the column `text_field`.
        tokenizer: With an end-of-text token.
        text_field: Name of the column.
        num_proc: Processes to use.

    Returns:
        A dataset with the column "input_ids", one row a document, cached beside `documents`.
    """
    # a tokenizer hashes differently once it has been used; its written form does not
    identity = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    encode = partial(_encode, tokenizer=tokenizer, text_field=text_field)
    tokens: datasets.Dataset = documents.map(
        encode,
        batched=True,
        batch_size=256,
        num_proc=num_proc,
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        new_fingerprint=Hasher.hash((_CACHE_VERSION, documents._fingerprint, identity, text_field)),
        desc="Tokenizing",
    )
    return tokens


def _encode(
    rows: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, text_field: str
) -> dict[str, list[list[int]]]:
    # verbose=False: documents are cut into blocks later, so none is too long
    encoded = tokenizer(rows[text_field], add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}


def pack(tokens: datasets.Dataset, block_size: int, keep_last: bool = False) -> datasets.Dataset:
    """Cut the stream of all documents into blocks.

    Args:
        tokens: What `tokenize` returned. The stream is held in memory once, at four bytes a token.
        block_size: Tokens in a block.
        keep_last: Keep the rest as a shorter last block, if it has at least two tokens.

    Returns:
        A dataset with the column "input_ids": the concatenated blocks are the stream, less a dropped rest.

    Raises:
        ValueError: If not even one block results.
    """
    total = _count(tokens, "input_ids", pc.list_value_length)
    shortest = 2 if keep_last else block_size
    if total < shortest:
        raise ValueError(
            f"The text has {total} tokens, fewer than one block of block_size={block_size}. Pass a smaller "
            "block_size, keep_last=True, or more text."
        )
    blocks: datasets.Dataset = tokens.with_format("arrow").map(
        partial(_cut, block_size=block_size, keep_last=keep_last),
        batched=True,
        batch_size=-1,  # the whole stream: batches would each leave a rest
        new_fingerprint=Hasher.hash((_CACHE_VERSION, tokens._fingerprint, block_size, keep_last)),
        desc="Packing",
    )
    return blocks.with_format(None)


def _cut(table: pa.Table, block_size: int, keep_last: bool) -> pa.Table:
    stream = table.column("input_ids").combine_chunks().flatten()
    rest = len(stream) % block_size
    if rest and (not keep_last or rest < 2):
        stream = stream.slice(0, len(stream) - rest)
    starts = np.append(np.arange(0, len(stream), block_size), len(stream))
    blocks = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), stream)
    return pa.table({"input_ids": blocks})


def collate(blocks: Sequence[Mapping[str, Any]], pad_id: int | None = None) -> dict[str, Tensor]:
    """Stack blocks into a batch.

    Args:
        blocks: Items with "input_ids", arrays of shape (T,), and "labels" likewise if they differ from these.
        pad_id: Pad shorter blocks on the right with this token, and add "attention_mask". Without it all blocks
            have the same length.

    Returns:
        "input_ids" and "labels" of shape (B, T), int64; labels are -100 at padding.
    """
    rows = [torch.as_tensor(np.asarray(block["input_ids"], dtype=np.int64)) for block in blocks]
    if pad_id is None:
        input_ids = torch.stack(rows)
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]  # [B, T]
    labels = input_ids.masked_fill(~mask, IGNORE_INDEX)
    if "labels" in blocks[0]:
        given = [torch.as_tensor(np.asarray(block["labels"], dtype=np.int64)) for block in blocks]
        labels = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


class _TextPrefix:
    """The first `share` of the characters of a column, one document at a time; can be iterated repeatedly."""

    def __init__(self, documents: datasets.Dataset, text_field: str, share: float) -> None:
        self.documents, self.text_field = documents, text_field
        self.characters = int(_count(documents, text_field, pc.utf8_length) * share)

    def __iter__(self) -> Iterator[str]:
        left = self.characters
        for row in self.documents:
            if left <= 0:
                return
            text: str = row[self.text_field][:left]
            left -= len(text)
            yield text


def _count(dataset: datasets.Dataset, column: str, length: Any) -> int:
    """Sum of the lengths of a column's values, without turning them into Python objects."""
    return int(pc.sum(length(dataset.with_format("arrow")[:][column])).as_py() or 0)


def _is_local(source: str | list[str]) -> bool:
    return isinstance(source, list) or source in EMBEDDED or looks_like_path(source)


def _local_documents(
    source: str | list[str], argument: str, sample_by: str, cache_dir: str | None, streaming: bool = False
) -> Any:
    files = _local_files(source, argument)
    readers = {_READERS[file.suffix.lower()] for file in files}
    if len(readers) > 1:
        kinds = sorted({file.suffix for file in files})
        raise ValueError(
            f"{argument}={source!r} mixes files of the kinds {kinds}. Pass files of one kind, e.g. as a list."
        )
    reader = readers.pop()
    options = {"sample_by": sample_by} if reader == "text" else {}
    try:
        return datasets.load_dataset(
            reader,
            data_files=[str(file) for file in files],
            split="train",
            cache_dir=cache_dir,
            streaming=streaming,
            **options,
        )
    except DatasetGenerationError as error:
        found = (bad_json_line(file) for file in files if file.suffix.lower() == ".jsonl")
        if problem := next(filter(None, found), None):
            raise ValueError(f"{argument}={source!r}: {problem}") from error
        raise


def _local_files(source: str | list[str], argument: str) -> list[Path]:
    """The text files that `source` names, sorted within a folder."""
    files: list[Path] = []
    for entry in [source] if isinstance(source, str) else source:
        path = EMBEDDED[entry] if entry in EMBEDDED else existing_path(entry, argument)
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in _READERS)
            if not found:
                raise ValueError(f"{argument}={entry!r} is a folder without {', '.join(_READERS)} files.")
            files += found
        elif path.suffix.lower() in _READERS:
            files.append(path)
        else:
            raise ValueError(
                f"{argument}={entry!r} has the unknown extension {path.suffix!r}. Use one of "
                f"{', '.join(_READERS)}; plain text belongs in a .txt file."
            )
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{argument}={source!r} is empty. Pass a file with text.")
    return files


def _text_only(
    documents: datasets.Dataset, text_field: str, source: str | list[str], argument: str
) -> datasets.Dataset:
    """The text column alone, without documents that hold no text."""
    if text_field not in documents.column_names:
        raise ValueError(
            f"text_field={text_field!r} is not in {argument}={source!r}, which has the fields "
            f"{documents.column_names}. Pass one of them as text_field."
        )
    documents = documents.select_columns([text_field])
    kind = documents.features[text_field]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"text_field={text_field!r} of {argument}={source!r} holds {kind}, not text.")
    documents = documents.filter(_has_text, input_columns=[text_field], desc="Dropping empty documents")
    if len(documents) == 0:
        raise ValueError(f"{argument}={source!r} holds no text in the field {text_field!r}.")
    return documents


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def _hold_out(blocks: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off the last `share` of the blocks, at least one unless the share is zero."""
    if not share:
        return blocks, blocks.select([])
    held_out = max(1, round(share * len(blocks)))
    if held_out >= len(blocks):
        raise ValueError(
            f"The text has {len(blocks)} block(s) or conversation(s), too few to train on after holding out {held_out} "
            f"(validation_share={share}). Pass a smaller block_size, more text, validation files, or "
            "validation_share=0."
        )
    cut = len(blocks) - held_out
    return blocks.select(range(cut)), blocks.select(range(cut, len(blocks)))


def _prepared(blocks: Any, name: str) -> Any:
    if blocks is None:
        raise RuntimeError(f"{name} does not exist yet. Call setup() of the data module first.")
    return blocks


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")
