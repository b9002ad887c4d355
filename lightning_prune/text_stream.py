"""Text too large to prepare beforehand: documents are read, tokenized and packed into blocks while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

# Documents tokenized at a time.
_BATCH = 64


class StreamedBlocks(IterableDataset[dict[str, Any]]):
    """Blocks of tokens from a stream of documents, with an end-of-text token after each document.

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
        shuffled = documents.select_columns([text_field]).shuffle(seed=seed, buffer_size=buffer_size)
        self.documents = split_dataset_by_node(shuffled, rank=rank, world_size=num_replicas)
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.block_size = block_size
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Blocks ``{"input_ids": [T]}``, int64."""
        self.documents.set_epoch(self.epoch)
        self.epoch += 1
        rest = np.empty(0, dtype=np.int64)
        texts = (row[self.text_field] for row in self.documents)
        while batch := self._next(texts):
            found = [text for text in batch if text and text.strip()]
            if not found:
                continue
            encoded = self.tokenizer(found, add_special_tokens=False, return_attention_mask=False, verbose=False)
            end = [self.tokenizer.eos_token_id]
            stream = np.concatenate([rest, *(np.asarray([*ids, *end]) for ids in encoded["input_ids"])])
            whole = len(stream) // self.block_size * self.block_size
            for block in stream[:whole].reshape(-1, self.block_size):
                yield {"input_ids": block}
            rest = stream[whole:]

    @staticmethod
    def _next(texts: Iterator[str]) -> list[str]:
        try:
            return list(islice(texts, _BATCH))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"a text file of the stream is not UTF-8: {error}; convert it, such as with: iconv -f LATIN1 -t UTF-8"
            ) from error
