"""Cut tokens into sequences of one length, all at once or from a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from datasets.distributed import split_dataset_by_node
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from lightning_prune.checkpoints.sources import first_token
from lightning_prune.pruning.running import IGNORE_INDEX

# part of the cache key: raise it when tokenizing or packing changes
_CACHE_VERSION = 1


def fingerprint(dataset: datasets.Dataset, *settings: Any) -> str:
    """Return the cache key of what is made from a dataset by settings, which the library would guess from the code."""
    key: str = Hasher.hash((dataset._fingerprint, *settings))
    return key


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
        features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
        new_fingerprint=fingerprint(documents, _CACHE_VERSION, identity, text_field),
        desc="Tokenizing",
    )
    return tokens


def _encode(
    rows: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, text_field: str
) -> dict[str, list[list[int]]]:
    # verbose=False: documents are cut into blocks later, so none is too long
    encoded = tokenizer(rows[text_field], add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}


def pack(
    tokens: datasets.Dataset, block_size: int, keep_last: bool = False, begin: int | None = None
) -> datasets.Dataset:
    """Cut the stream of all documents into blocks.

    Args:
        tokens: What `tokenize` returned. The stream is held in memory once, at four bytes a token.
        block_size: Tokens in a block.
        keep_last: Keep the rest as a shorter last block, if it has at least two tokens.
        begin: A token that every block begins with, see `first_token` of `lightning_prune.checkpoints.sources`.

    Returns:
        A dataset with the column "input_ids": the concatenated blocks, without `begin`, are the stream, less a
        dropped rest.

    Raises:
        ValueError: If not even one block results.
    """
    total = _count(tokens, "input_ids", pc.list_value_length)
    shortest = 2 if keep_last else block_size
    if total < shortest - (begin is not None):
        raise ValueError(
            f"The text has {total} tokens, fewer than one block of block_size={block_size}. Pass a smaller "
            "block_size, keep_last=True, or more text."
        )
    blocks: datasets.Dataset = tokens.with_format("arrow").map(
        partial(_cut, block_size=block_size, keep_last=keep_last, begin=begin),
        batched=True,
        batch_size=-1,  # the whole stream: batches would each leave a rest
        new_fingerprint=fingerprint(tokens, _CACHE_VERSION, block_size, keep_last, begin),
        desc="Packing",
    )
    return blocks.with_format(None)


def _cut(table: pa.Table, block_size: int, keep_last: bool, begin: int | None) -> pa.Table:
    stream = table.column("input_ids").combine_chunks().flatten()
    added = 0 if begin is None else 1
    rest = len(stream) % (block_size - added)
    if rest and (not keep_last or rest + added < 2):
        stream = stream.slice(0, len(stream) - rest)
    starts = np.arange(0, len(stream), block_size - added)
    if begin is not None:
        stream = pa.array(np.insert(stream.to_numpy(), starts, begin))
        starts += np.arange(len(starts))
    blocks = pa.ListArray.from_arrays(pa.array(np.append(starts, len(stream)), pa.int32()), stream)
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


class TextPrefix:
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


def hold_out(blocks: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
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


# Documents tokenized at a time.
_BATCH = 64


class StreamedBlocks(IterableDataset[dict[str, Any]]):
    """Blocks of tokens from a stream of documents, with an end-of-text token after each document.

    Each begins with the token that the tokenizer puts before every text, if it does that.

    Documents are shuffled within a buffer, anew in each epoch. Processes and their workers read different documents
    (different files, where there are enough of them). The rest of a stream that fills no block is dropped.

    Args:
        documents: A streaming dataset of the datasets library.
        tokenizer: With an end-of-text token.
        text_field: Column that holds the text.
        block_size: Tokens in a block.
        seed: Of the order.
        buffer_size: Documents in the shuffling buffer.
        rank: Of this process among those that read different documents.
        num_replicas: Number of these.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        text_field: str = "text",
        block_size: int = 512,
        seed: int = 0,
        buffer_size: int = 1000,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.documents = documents.select_columns([text_field])
        self.seed, self.buffer_size, self.rank, self.num_replicas = seed, buffer_size, rank, num_replicas
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.block_size = block_size
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # workers live on

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the passes that follow, which decides their order with the seed."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Blocks ``{"input_ids": [T]}``, int64."""
        # Not `set_epoch` of the documents: workers share that number, and each would add to it.
        shuffled = self.documents.shuffle(seed=self.seed + int(self.epoch), buffer_size=self.buffer_size)
        documents = split_dataset_by_node(shuffled, rank=self.rank, world_size=self.num_replicas)
        rest, begin = np.empty(0, dtype=np.int64), first_token(self.tokenizer)
        first = np.asarray([] if begin is None else [begin], dtype=np.int64)
        own = self.block_size - len(first)
        texts = (row[self.text_field] for row in documents)
        while batch := self._next(texts):
            found = [text for text in batch if text and text.strip()]
            if not found:
                continue
            encoded = self.tokenizer(found, add_special_tokens=False, return_attention_mask=False, verbose=False)
            end = [self.tokenizer.eos_token_id]
            stream = np.concatenate([rest, *(np.asarray([*ids, *end]) for ids in encoded["input_ids"])])
            whole = len(stream) // own * own
            for block in stream[:whole].reshape(-1, own):
                yield {"input_ids": np.concatenate([first, block])}
            rest = stream[whole:]

    @staticmethod
    def _next(texts: Iterator[str]) -> list[str]:
        try:
            return list(islice(texts, _BATCH))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"a text file of the stream is not UTF-8: {error}; convert it, such as with: iconv -f LATIN1 -t UTF-8"
            ) from error
