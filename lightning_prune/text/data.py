"""Text as blocks of tokens: a LightningDataModule on the datasets library.

The way of the data: files or the hub -> documents (`documents`) -> tokens -> blocks -> batches (`sequences`), or
without any preparation a stream of them. Conversations are samples of their own (`chat`).

Letters: B samples, T tokens (block_size).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler
from transformers import PreTrainedTokenizerBase

from lightning_prune.checkpoints.sources import (
    first_token,
    load_tokenizer,
    named_where_it_fails,
    plain_source,
    trained_tokenizer,
)
from lightning_prune.errors import check_whole
from lightning_prune.safety import expanded
from lightning_prune.text.chat import check_chat_tokenizer, tokenize_conversations
from lightning_prune.text.documents import (
    EMBEDDED,
    check_parts,
    is_local,
    is_saved,
    local_documents,
    saved_rows,
    saved_splits,
    text_only,
)
from lightning_prune.text.sequences import StreamedBlocks, TextPrefix, collate, hold_out, pack, tokenize

__all__ = ["EMBEDDED", "TextDataModule", "collate", "pack", "tokenize"]


class EpochLoader(DataLoader[Any]):
    """Batches in an order of each epoch's own."""

    epoch = 0
    _begun = False  # whether a batch of the epoch was read: Lightning may begin a pass twice
    _dropped = 0

    def begin(self, epoch: int, dropped: int = 0) -> None:
        """Go on with this epoch in the next pass, after so many batches, which are read and dropped."""
        self.epoch, self._begun, self._dropped = epoch, False, dropped

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._begun:
            self.begin(self.epoch + 1)
        self._order_by(self.epoch)  # for workers, which are given samples at once
        return self._rest(super().__iter__(), self.epoch, self._dropped)

    def _order_by(self, epoch: int) -> None:
        order = self.dataset if isinstance(self.dataset, StreamedBlocks) else self.sampler
        if isinstance(order, (StreamedBlocks, DistributedSampler)):  # not without a Trainer, nor to overfit batches
            order.set_epoch(epoch)

    def _rest(self, batches: Iterator[Any], epoch: int, dropped: int) -> Iterator[Any]:
        # Without workers the order is made now. Meanwhile Lightning has told the sampler its own number of the epoch,
        # which is another where a fit ended within one: that one counts as over there.
        self._order_by(epoch)
        read = 0
        for read, batch in enumerate(batches, 1):
            if read > dropped:
                self._begun = True
                yield batch
        if not read:  # Lightning would end without a step, or begin epochs for ever
            raise ValueError(
                f"The stream has not one batch of {self.batch_size} blocks for this process. Pass more text, or a "
                "smaller batch_size, block_size or num_workers."
            )


class _Reader:
    """The Trainer that reads a loader, which copies of the loader do not have.

    Lightning sets attributes of a loader anew on the one it may put in its place, and keeps them beside it.
    """

    def __init__(self, trainer: L.Trainer | None = None) -> None:
        self.trainer = trainer

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reader, ()


class ResumableLoader(EpochLoader):
    """Batches that go on where a resumed fit had stopped, of a loader whose Trainer is known.

    Lightning keeps the state of a loader that has one. It has others begin the epoch anew, and warns of that.
    """

    reader = _Reader()
    _trained: int | None = None  # batches in all when the pass began: until there are more, the progress is the last's

    def begin(self, epoch: int, dropped: int = 0) -> None:
        super().begin(epoch, dropped)
        if (trainer := self.reader.trainer) is not None:
            progress: Any = trainer.fit_loop.epoch_loop.batch_progress
            self._trained = progress.total.processed

    def state_dict(self) -> dict[str, int]:
        trainer = self.reader.trainer
        if trainer is None:
            return {}
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if progress.total.processed == self._trained:
            return {"epoch": self.epoch, "batches": self._dropped}
        batches = progress.current.processed
        if progress.is_last_batch or batches >= trainer.num_training_batches:
            return {"epoch": self.epoch + 1, "batches": 0}
        return {"epoch": self.epoch, "batches": batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state:
            self.begin(state["epoch"], state["batches"])


class TextDataModule(L.LightningDataModule):
    """Blocks of text for a causal language model.

    A batch is a dict of int64 tensors (B, T): "input_ids" and "labels", the same ids unshifted. With
    `keep_last`, also "attention_mask", and labels are -100 where it is 0.

    A block begins with the token that the tokenizer puts before every text, if it does that (Gemma, Llama), since the
    models expect it; every document ends with an end-of-text token, which is all that stands between two in a block.

    The validation blocks come from `validation`, or are the last `validation_share` of the blocks of `source`;
    they share no token with the training blocks.

    With `messages_field` a sample is a conversation, rendered by the tokenizer's chat template and padded to the
    longest of its batch ("attention_mask"). Labels are -100 outside what the assistant says, which includes its
    end-of-turn token. What is longer than `block_size` is cut at its end; where no label is left, the conversation is
    dropped. A warning counts both.

    Each epoch has an order of its own, which processes share. A resumed fit goes on with the next batch, also within an
    epoch, where the Trainer is given this module (not the loader alone).

    Args:
        source: "austen" (*Pride and Prejudice*, embedded in the package), local .txt, .jsonl, .json or .parquet
            files or a folder of them (UTF-8, or with a mark of UTF-8, -16 or -32 at the beginning of .txt files), a
            folder that `save_to_disk` of the datasets library has written, or the name of a dataset on the hub.
        name: Configuration of the hub dataset, e.g. "wikitext-2-raw-v1".
        split: Split of the hub dataset, or of a saved `DatasetDict`, to train on.
        revision: Branch, tag or commit of the hub dataset.
        validation: Validation text: local files, "austen", or a split of the dataset `source`.
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
            `max_steps` says when training ends, and a resumed training reads the stream's beginning again, which it
            drops.
        messages_field: Field or column that holds conversations, lists of {"role", "content"} (usually "messages"), in
            place of text. The roles are "system", "user", "assistant" and "tool", as far as the template knows them.
        train_on: Of conversations: labels on the "assistant"'s tokens, or on "all".

    Raises:
        ValueError: If an argument is out of range. On `setup`: if the text is empty or too short for the blocks
            asked for, a file has an unknown extension, or the text field is missing; if `cache_dir` cannot be
            used; if the tokenizer has no chat template, a row is no conversation, or the template does not allow to
            tell the assistant's tokens.
        FileNotFoundError: If a local file does not exist.

    Examples:
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
        for argument, value in (("source", source), ("validation", validation), ("test", test)):
            _check_plain(argument, value)
        source, validation, test = map(plain_source, (source, validation, test))
        tokenizer, cache_dir = plain_source(tokenizer), plain_source(cache_dir)  # a Path would make checkpoints unsafe
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
        check_whole("block_size", block_size, 2)
        check_whole("batch_size", batch_size)
        check_whole("num_workers", num_workers, 0)
        if num_proc is not None:
            check_whole("num_proc", num_proc)
        check_whole("vocab_size", vocab_size)
        if not isinstance(validation_share, (int, float)) or not 0 <= validation_share < 1:
            raise ValueError(f"validation_share={validation_share!r} must lie in [0, 1). Try 0.05.")
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
                with self._naming_cache_dir() as folder:
                    self._tokenizer = trained_tokenizer(
                        self._training_text(), hp["vocab_size"], folder / "lightning_prune_tokenizers"
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
        check_parts(hp["source"], "source", name=hp["name"], split=hp["split"], revision=hp["revision"])
        with self._naming_cache_dir():
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
                    self._train, self._validation = hold_out(blocks, hp["validation_share"])
            if self._test is None and hp["test"] is not None and stage in ("test", "all"):
                self._test = self._blocks(hp["test"], "test")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training blocks in an order given by `seed` and the epoch; a resumed fit goes on with the next."""
        hp = self.hparams
        # Without a Trainer nobody says which batches were trained on, so nothing is kept that could be taken for it.
        kind = EpochLoader if self.trainer is None else ResumableLoader
        if hp["streaming"]:
            stream, names = _prepared(self._stream, "the stream"), (hp["text_field"], hp["block_size"])
            blocks = StreamedBlocks(stream, self.tokenizer, *names, seed=hp["seed"], **self._share())
            return self._loader(blocks, kind, collate_fn=collate, drop_last=True)
        data = self.train_dataset
        order: Sampler[Any]
        if self.trainer is None:  # Fabric shares this one out to processes, as any but a DistributedSampler
            order = RandomSampler(data, generator=torch.Generator().manual_seed(hp["seed"]))
        else:
            order = DistributedSampler(data, seed=hp["seed"], shuffle=True, **self._share())
        return self._loader(data.with_format("numpy"), kind, collate_fn=self._collate(), sampler=order)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of validation blocks in the order of the text; an empty list if nothing is held out."""
        return self._in_order(self.val_dataset) if len(self.val_dataset) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of test blocks in the order of the text."""
        if self.hparams["test"] is None:
            raise ValueError("There is no test text. Pass test=, files or a split of the hub dataset.")
        return self._in_order(self.test_dataset)

    def _in_order(self, blocks: datasets.Dataset) -> DataLoader[Any]:
        return self._loader(blocks.with_format("numpy"), collate_fn=self._collate())

    def _share(self) -> dict[str, Any]:
        """Which of the processes that read different samples this is, and how many they are."""
        if self.trainer is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "streaming=True without a Trainer, in one of several processes: which of the documents are its own "
                "cannot be told. Pass a DataLoader of lightning_prune.text.sequences.StreamedBlocks(rank=, "
                "num_replicas=), or streaming=False"
            )
        found = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return found or {"rank": 0, "num_replicas": 1}

    def _collate(self) -> Callable[[list[Any]], dict[str, Any]]:
        padded = self.hparams["keep_last"] or self.hparams["messages_field"] is not None
        pad_id = self.tokenizer.pad_token_id if padded else None
        if padded and pad_id is None:
            pad_id = self.tokenizer.eos_token_id
        return partial(collate, pad_id=pad_id)

    def _loader(self, data: Any, kind: type[DataLoader[Any]] = DataLoader, **how: Any) -> DataLoader[Any]:
        size, workers = self.hparams["batch_size"], self.hparams["num_workers"]
        loader = kind(data, batch_size=size, num_workers=workers, persistent_workers=workers > 0, **how)
        if isinstance(loader, ResumableLoader) and (trainer := self.trainer) is not None:
            progress: Any = trainer.fit_loop.epoch_progress.current
            loader.reader = _Reader(trainer)
            loader.begin(progress.processed)  # of a resumed fit not the first
        return loader

    def _streamed_documents(self, source: str | list[str]) -> datasets.IterableDataset:
        hp = self.hparams
        if is_saved(source):
            documents = saved_rows(str(source), hp["split"], "source", streaming=True)
        elif isinstance(source, str) and not is_local(source):
            with named_where_it_fails("source", source):
                documents = datasets.load_dataset(
                    source,
                    hp["name"],
                    split=hp["split"],
                    revision=hp["revision"],
                    cache_dir=hp["cache_dir"],
                    streaming=True,
                )
        else:
            documents = local_documents(source, "source", hp["sample_by"], hp["cache_dir"], streaming=True)
        # Older versions of datasets do not know them before they have read a row.
        columns = documents.column_names or list(next(iter(documents), {hp["text_field"]: ""}))
        if hp["text_field"] not in columns:
            raise ValueError(
                f"text_field={hp['text_field']!r} is not in source={source!r}, which has the fields {columns}. Pass "
                "one of them as text_field."
            )
        return documents

    @contextmanager
    def _naming_cache_dir(self) -> Iterator[Path]:
        """The folder of the cache; where it cannot be used, an error names the argument."""
        folder = expanded(self.hparams["cache_dir"] or datasets.config.HF_DATASETS_CACHE, "cache_dir").absolute()
        try:
            yield folder
        except OSError as error:
            place = Path(os.fsdecode(error.filename or os.devnull)).absolute()
            if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
                raise
            raise ValueError(
                f"cache_dir={str(folder)!r} cannot be used ({error.strerror}: {str(place)!r}); choose a folder that "
                "can be written to"
            ) from error

    def _blocks(self, source: str | list[str], argument: str) -> datasets.Dataset:
        hp = self.hparams
        if hp["messages_field"] is not None:
            return self._conversations(source, argument)
        tokens = tokenize(self._documents(source, argument), self.tokenizer, hp["text_field"], num_proc=hp["num_proc"])
        return pack(tokens, hp["block_size"], keep_last=hp["keep_last"], begin=first_token(self.tokenizer))

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
        return text_only(self._rows(source, argument), self.hparams["text_field"], source, argument)

    def _rows(self, source: str | list[str], argument: str) -> datasets.Dataset:
        """Local files, or a split of a hub dataset, with all their columns."""
        hp = self.hparams
        if argument != "source" and source in saved_splits(hp["source"]):
            return saved_rows(hp["source"], str(source), argument)
        if is_saved(source):
            return saved_rows(str(source), hp["split"] if argument == "source" else argument, argument)
        on_hub = argument == "source" and isinstance(source, str) and not is_local(source)
        split_of_hub = argument != "source" and isinstance(source, str) and not is_local(source)
        if on_hub or (split_of_hub and isinstance(hp["source"], str) and not is_local(hp["source"])):
            with named_where_it_fails("source", hp["source"]):
                return datasets.load_dataset(
                    hp["source"],
                    hp["name"],
                    split=hp["split"] if on_hub else source,
                    revision=hp["revision"],
                    cache_dir=hp["cache_dir"],
                )
        return local_documents(source, argument, hp["sample_by"], hp["cache_dir"])

    def _training_text(self) -> TextPrefix:
        """The text of `source` without the characters of a held-out share at its end."""
        hp = self.hparams
        held_out = hp["validation_share"] if hp["validation"] is None else 0.0
        return TextPrefix(self._documents(hp["source"], "source"), hp["text_field"], 1 - held_out)


def _prepared(blocks: Any, name: str) -> Any:
    if blocks is None:
        raise RuntimeError(f"{name} does not exist yet. Call setup() of the data module first.")
    return blocks


def _check_plain(argument: str, value: Any) -> None:
    """Refuse objects: they would be pickled into every checkpoint, which could not be loaded safely then."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    wrong = next((e for e in entries if e is not None and not isinstance(e, (str, Path))), None)
    if wrong is not None:
        raise ValueError(
            f"{argument} is a {type(wrong).__name__}. Pass names of files, a folder or a hub dataset: of a Dataset, "
            "the folder that its save_to_disk(folder) writes; of a stream, a DataLoader of "
            "lightning_prune.text.sequences.StreamedBlocks, given to trainer.fit in place of this module."
        )
