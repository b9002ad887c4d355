"""A resumed fit trains on the batches that an uninterrupted one would have trained on."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.checkpoints.sources import trained_tokenizer
from lightning_prune.text.data import EMBEDDED, TextDataModule

TEXT = EMBEDDED["austen"].read_text(encoding="utf-8")[:20_000]
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Seeing(L.LightningModule):
    """Keeps the batches it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(batch["input_ids"].clone())
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("text")
    for part in range(4):  # several files, for several workers
        (folder / f"{part}.txt").write_text(TEXT[part * 5_000 : (part + 1) * 5_000], encoding="utf-8")
    tokenizer = trained_tokenizer([TEXT], 300, folder / "tokenizers")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, tokenizer


def data_of(made: tuple[Path, Any], **how: Any) -> TextDataModule:
    folder = made[0]
    return TextDataModule(
        [str(folder / f"{part}.txt") for part in range(4)], tokenizer=str(folder / "tokenizer"), block_size=64,
        batch_size=16, cache_dir=str(folder / "cache"), validation_share=0.0, **how,
    )  # fmt: skip


def fit(
    made: tuple[Path, Any], how: dict[str, Any], ends: dict[str, Any], out: Path, resume: Path | None = None
) -> Any:
    """Batches that a fit trained on, and those of an epoch."""
    module = Seeing()
    saving = [
        ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(out, filename="end {step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
    ]
    trainer = L.Trainer(
        **QUIET, **ends, callbacks=saving if resume is None else [], enable_checkpointing=resume is None
    )
    trainer.fit(module, data_of(made, **how), ckpt_path=resume)
    return module.seen


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("ends", "workers"),
    [
        pytest.param({"max_epochs": 3}, 2, marks=pytest.mark.slow),
        ({"max_epochs": 3, "limit_train_batches": 4}, 0),
        pytest.param({"max_steps": 30}, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_batches_after_a_resume_are_the_next_ones(
    ends: dict[str, Any], streaming: bool, workers: int, made: tuple[Path, Any], tmp_path: Path
) -> None:
    how = {"streaming": streaming, "num_workers": workers}
    whole = fit(made, how, ends, tmp_path)
    ended = sorted(int(path.stem.removeprefix("end step=")) for path in tmp_path.glob("end step=*.ckpt"))
    length = ended[0]
    assert not torch.equal(torch.cat(whole[:length]), torch.cat(whole[length : 2 * length]))  # another order
    # Within an epoch, and at its end as a step's and as an epoch's checkpoint. With max_steps Lightning takes the first
    # batch after an epoch's checkpoint for a whole epoch, whatever the loader.
    for name, at in (("", 2), ("", length), ("end ", length), ("", length + 1), ("end ", 2 * length), ("", 2 * length)):
        if name and "max_steps" in ends:
            continue
        rest = fit(made, how, ends, tmp_path, tmp_path / f"{name}step={at}.ckpt")
        assert len(rest) == len(whole) - at, (name, at)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[at:], strict=True)), (name, at)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fit_that_ended_within_an_epoch_goes_on_with_the_next_batch(
    workers: int, streaming: bool, made: tuple[Path, Any], tmp_path: Path
) -> None:
    """Lightning counts the epoch as one that is over, and tells the sampler the next one's number."""
    how = {"streaming": streaming, "num_workers": workers}
    whole = fit(made, how, {"max_steps": 20}, tmp_path / "whole")
    length = min(int(path.stem.removeprefix("end step=")) for path in (tmp_path / "whole").glob("end step=*.ckpt"))
    assert length + 3 < 20
    for at in (2, length + 2):
        fit(made, how, {"max_steps": at}, tmp_path)
        rest = fit(made, how, {"max_steps": 20}, tmp_path, tmp_path / f"end step={at}.ckpt")
        assert len(rest) == 20 - at
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[at:], strict=True)), at


class AtStart(L.Callback):
    """Saves before the first batch, and at the start of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "start.ckpt")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch {trainer.current_epoch}.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("reload", [0, 1])
def test_checkpoints_from_before_the_first_batch_of_a_pass_name_it(
    reload: int, streaming: bool, made: tuple[Path, Any], tmp_path: Path
) -> None:
    how, ends = {"streaming": streaming}, {"max_epochs": 3, "limit_train_batches": 4}
    whole = fit(made, how, ends, tmp_path)

    def state(name: str) -> Any:
        loops = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["loops"]
        return loops["fit_loop"]["state_dict"]["combined_loader"]

    for at, expected in ((2, {"epoch": 0, "batches": 2}), (4, {"epoch": 1, "batches": 0})):
        trainer = L.Trainer(
            **QUIET, **ends, callbacks=AtStart(tmp_path), reload_dataloaders_every_n_epochs=reload,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Seeing(), data_of(made, **how), ckpt_path=tmp_path / f"step={at}.ckpt")
        assert state("start") == [expected]
        assert state("epoch 2") == [{"epoch": 2, "batches": 0}]
        rest = fit(made, how, ends, tmp_path, tmp_path / "start.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[at:], strict=True)), at


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_trainer_each_pass_has_an_order_of_its_own(streaming: bool, made: tuple[Path, Any]) -> None:
    data = data_of(made, streaming=streaming)
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = (torch.cat([batch["input_ids"] for batch in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    again = data.train_dataloader()
    assert torch.equal(torch.cat([batch["input_ids"] for batch in again]), first)


def test_a_loader_without_its_module_is_not_taken_for_one_that_goes_on(made: tuple[Path, Any], tmp_path: Path) -> None:
    data = data_of(made)
    data.setup("fit")

    def fit_alone(resume: Path | None = None) -> None:
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(**QUIET, max_epochs=1, limit_train_batches=3, callbacks=saving)
        trainer.fit(Seeing(), data.train_dataloader(), ckpt_path=resume)

    fit_alone()
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        fit_alone(tmp_path / "step=1.ckpt")


def test_processes_share_the_blocks_of_an_epoch(made: tuple[Path, Any]) -> None:
    seen = []
    for rank in range(2):
        data, progress = (
            data_of(made),
            SimpleNamespace(
                epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=1)),
                epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=3))),
            ),
        )
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank}, fit_loop=progress)
        data.setup("fit")
        seen.append({tuple(row) for batch in data.train_dataloader() for row in batch["input_ids"].tolist()})
    whole = {tuple(row) for row in data.train_dataset["input_ids"]}
    assert seen[0] | seen[1] == whole
    assert len(seen[0] & seen[1]) <= 1  # filled up to an even number


class TwoProcesses(SingleDeviceStrategy):
    """What Fabric asks of a strategy of several processes, of which this is one."""

    def __init__(self, rank: int) -> None:
        super().__init__("cpu")
        self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}


def test_processes_of_fabric_share_the_blocks_of_an_epoch(made: tuple[Path, Any]) -> None:
    passes: list[list[set[Any]]] = []
    for rank in range(2):
        data = data_of(made)
        data.setup("fit")
        loader: Any = Fabric(strategy=TwoProcesses(rank)).setup_dataloaders(data.train_dataloader())
        passes.append([{tuple(row) for batch in loader for row in batch["input_ids"].tolist()} for _ in range(2)])
    whole = {tuple(row) for row in data.train_dataset["input_ids"]}
    for first, second in zip(*passes, strict=True):
        assert first | second == whole
        assert len(first & second) <= 1
    assert passes[0][0] != passes[0][1]  # each epoch deals them out anew


def test_a_stream_that_several_processes_would_all_read_whole_is_refused(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(made, streaming=True)
    data.setup("fit")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"streaming=True without a Trainer.*StreamedBlocks\(rank="):
        data.train_dataloader()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_a_batch_is_refused(workers: int, made: tuple[Path, Any]) -> None:
    trainer = L.Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    data = TextDataModule(
        str(made[0] / "0.txt"), tokenizer=str(made[0] / "tokenizer"), streaming=True, block_size=64, batch_size=1000,
        num_workers=workers, cache_dir=str(made[0] / "cache"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="has not one batch of 1000 blocks"):
        trainer.fit(Seeing(), data)


def test_copies_are_apart_from_the_fit(made: tuple[Path, Any]) -> None:
    data, module = data_of(made), Seeing()
    trainer = L.Trainer(**QUIET, max_epochs=1, limit_train_batches=1, enable_checkpointing=False)
    trainer.fit(module, data)
    loader: Any = trainer.train_dataloader
    assert loader.reader.trainer is trainer
    copies = [copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))]
    following = next(iter(loader))["input_ids"]
    for again in copies:
        assert again.reader.trainer is None
        assert b"Trainer" not in pickle.dumps(again)
        assert torch.equal(next(iter(again))["input_ids"], following)
