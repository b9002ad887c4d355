"""Checkpoints are read safely before Lightning reads them; what they claim is held against their bytes."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, make_tokens
from torch import nn
from torch.distributed.checkpoint import save as save_distributed
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, PERPRetraining, SparsityMonitor, WeightPruning
from lightning_prune.checkpoints.export import export
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.checkpoints.mask_files import load_masks, save_masks
from lightning_prune.checkpoints.reading import check_loads_safely, open_checkpoint, read_resumable
from lightning_prune.errors import CheckpointError
from lightning_prune.pruning.masks import pack_masks, unpack_masks
from lightning_prune.safety import CHECK_SUMS, add_check_sums

pytestmark = pytest.mark.filterwarnings("ignore")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def make_trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, default_root_dir=folder, callbacks=list(callbacks),
        **{**settings, **options},
    )  # fmt: skip


def loader() -> DataLoader[Any]:
    return DataLoader([{"input_ids": row} for row in make_tokens(4, 8)], batch_size=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, WeightPruning(score="magnitude", progress=False))
    trainer.fit(CausalLM(config=TINY, lr_schedule="constant"), loader())
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def distributed(folder: Path, **extra: Any) -> Path:
    """A distributed checkpoint with the extras of Lightning."""
    save_distributed({"state_dict": {"w": torch.ones(4, 4)}, **extra}, checkpoint_id=folder)
    torch.save(
        {"pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 1, "callbacks": {}}, folder / "meta.pt"
    )
    return folder


# -- before Lightning ------------------------------------------------------------------------------------------------


class Own(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch["input_ids"].float()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch["input_ids"].float())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("where", [".metadata", "__0.metadata", "an object among the tensors"])
def test_no_index_of_a_folder_is_run(where, tmp_path):
    bomb, folder = tmp_path / "exploded", tmp_path / "d"
    if where.startswith("an object"):
        distributed(folder, optimizer_0={"lr": Bomb(bomb)})
    else:
        distributed(folder)
        (folder / where).write_bytes(pickle.dumps(Bomb(bomb)))
    with pytest.raises(CheckpointError, match="could run code"):
        check_loads_safely(folder)
    assert not bomb.exists()


def test_a_good_folder_passes(tmp_path):
    folder = distributed(tmp_path / "d", optimizer_0={"param_groups": [{"lr": 0.1, "name": "all", "params": ["w"]}]})
    assert read_resumable(folder)["global_step"] == 1
    (folder / "meta.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no meta.pt"):
        check_loads_safely(folder)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("callback", ["pruning", "monitor", "perp", None])
def test_callbacks_and_the_module_read_it_first(stage, callback, tmp_path, monkeypatch):
    """None: CausalLM alone. Lightning would load in the strategy, which comes after every setup."""
    bomb = tmp_path / "exploded"
    distributed(tmp_path / "d")
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(Bomb(bomb)))
    made = {
        "pruning": lambda: [WeightPruning(score="magnitude", progress=False)],
        "monitor": lambda: [SparsityMonitor()],
        "perp": lambda: [PERPRetraining()],
        None: lambda: [],
    }[callback]()
    trainer = make_trainer(tmp_path, *made)
    monkeypatch.setattr(trainer.strategy, "load_checkpoint", lambda *a, **k: pytest.fail("Lightning loads it first"))
    module = Own() if callback in ("pruning", "monitor") else CausalLM(config=TINY, lr_schedule="constant")
    with pytest.raises(CheckpointError, match="could run code"):
        getattr(trainer, stage)(module, loader(), ckpt_path=tmp_path / "d")
    assert not bomb.exists()


def test_what_comes_from_the_web_is_refused():
    with pytest.raises(CheckpointError, match="download it first"):
        check_loads_safely("https://example.org/a.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": {}}, "which version of Lightning"),
        ({"pytorch-lightning_version": "2.6.0"}, "no state_dict"),
        ({"pytorch-lightning_version": "2.6.0", "state_dict": {}, "callbacks": [1]}, "a list under 'callbacks'"),
        ({"pytorch-lightning_version": "2.6.0", "state_dict": {}, "epoch": "x"}, "a str under 'epoch'"),
    ],
)
def test_what_lightning_could_not_resume_from(content, message, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_resumable(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "stored",
    [
        {"_instantiator": "own_trap.build"},
        {"_class_path": "own_trap.Model", "_instantiator": "lightning.pytorch.cli.instantiate_module"},
    ],
)
def test_no_class_is_imported_on_the_word_of_a_checkpoint(stored, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "own_trap.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'exploded')!r}).mkdir()")
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= stored
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="own_trap"):
        CausalLM.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "exploded").exists()
    assert "own_trap" not in sys.modules


@pytest.mark.parametrize("nested", [False, True])
def test_nor_by_the_command_line(nested, checkpoint, tmp_path, monkeypatch, capsys):
    from fit_configs import fit_config

    from lightning_prune.cli import main

    (tmp_path / "own_trap.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'exploded')!r}).mkdir()")
    (tmp_path / "t.txt").write_text("some text here. " * 300)
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    trap = {"class_path": "own_trap.Model"}
    content["hyper_parameters"] |= {"config": {"x": [trap]}} if nested else {"_class_path": "own_trap.Model"}
    torch.save(content, tmp_path / "a.ckpt")
    assert main(["fit", "--config", fit_config(tmp_path), "--ckpt_path", str(tmp_path / "a.ckpt")]) == 2
    assert "names the class 'own_trap.Model'" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_a_folder_is_refused_by_load_from_checkpoint_with_the_way_to_go(tmp_path):
    with pytest.raises(CheckpointError, match="lightning-prune export"):
        CausalLM.load_from_checkpoint(tmp_path)


# -- claims and bytes ------------------------------------------------------------------------------------------------


def grown_by(action: Any) -> float:
    """MiB that the peak of memory rises by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    action()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


GIANT = 2**31


@pytest.mark.parametrize("what", ["mask", "weight", "optimizer", "pending units"])
def test_expanded_tensors_take_no_memory(what, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    giant = torch.zeros(1, dtype=torch.uint8).expand(GIANT)
    if what == "mask":
        next(iter(content["callbacks"]["WeightPruning"]["masks"].values())).update(bits=giant, shape=[GIANT * 8])
    elif what == "weight":
        content["state_dict"]["model.lm_head.weight"] = giant
    elif what == "optimizer":
        content["optimizer_states"][0]["state"][0] = {"exp_avg": giant}
    else:
        shrinking = {"pending": {"ffn": [torch.zeros(1, dtype=torch.int64).expand(GIANT)]}}
        state = {"shrinking": shrinking, "settings": {"attention_unit": "kv_group"}}
        content["callbacks"]["PruningAwarePretraining"] = state
    torch.save(content, tmp_path / "b.ckpt")

    def refuse() -> None:
        with pytest.raises(CheckpointError, match="claim"):
            inspect(tmp_path / "b.ckpt")

    assert grown_by(refuse) < 300


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (torch.zeros(1, dtype=torch.uint8).expand(1000), [8000]),  # small enough for a file to pass as a whole
        (torch.zeros(0, dtype=torch.uint8), [2**32, 2**32]),  # whose product overflows to 0
        (torch.zeros(2, dtype=torch.uint8), [2**70]),
        (torch.zeros(2, dtype=torch.uint8), [-4, -4]),
    ],
)
def test_masks_hold_as_many_bits_as_their_shape(bits, shape):
    with pytest.raises(ValueError, match="mask of 'w' is damaged"):
        unpack_masks({"w": {"bits": bits, "shape": shape, "crc32": 0}})
    assert unpack_masks(pack_masks({"w": torch.ones(3, 3, dtype=torch.bool)}))["w"].all()


def test_mask_files_whose_shapes_grow(tmp_path):
    save_masks({"w": torch.ones(4, 4, dtype=torch.bool)}, tmp_path / "m.safetensors")
    bits = load_file(tmp_path / "m.safetensors")
    layout = {"w": {"shape": [2**33, 2**33], "crc32": 0}}
    save_file(bits, tmp_path / "m.safetensors", {"format": "lightning-prune masks 1", "masks": json.dumps(layout)})
    with pytest.raises(CheckpointError, match="damaged"):
        load_masks(tmp_path / "m.safetensors")


def test_a_compressed_archive_is_refused(checkpoint, tmp_path):
    """One of zeros packs a gigabyte into a megabyte."""
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(tmp_path / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(tmp_path / "z.ckpt")


@pytest.mark.parametrize("change", ["size of a tensor", "one place for many"])
def test_indexes_that_claim_more_than_the_files(change, tmp_path):
    folder = distributed(tmp_path / "d", more={str(i): torch.ones(8, 8) for i in range(8)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if change == "size of a tensor":
        entry = metadata.state_dict_metadata["state_dict.w"]
        entry.size = torch.Size([2**31, 2**33])  # overflows to 0
    else:
        whole = max(metadata.storage_data.values(), key=lambda info: info.length)
        for info in metadata.storage_data.values():
            info.offset, info.length = whole.offset, whole.length
        for index, info in list(metadata.storage_data.items()):
            metadata.storage_data[type(index)(f"{index.fqn}x", index.offset)] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"more than its chunks|claims"):
        dict(open_checkpoint(folder))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "", "sub/x.safetensors", 3])
def test_indexes_that_lead_elsewhere(shard, tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "outside.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match=r"outside|damaged|missing"):
        inspect(tmp_path / "m")


def test_a_tensor_in_two_shards(tmp_path):
    for name, value in (("a", 0.0), ("b", 1.0)):
        save_file({"w": torch.full((2, 2), value), name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    weight_map = {"w": "a.safetensors", "a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="'w' in 2 files"):
        inspect(tmp_path)


# -- check sums ------------------------------------------------------------------------------------------------------


def flip_weight(path: Path, weight: torch.Tensor) -> None:
    """Change one bit of a weight where its bytes lie in a file."""
    data = bytearray(path.read_bytes())
    place = data.index(weight.detach().contiguous().numpy().tobytes())
    data[place + 6] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("command", ["inspect", "export", "load", "resume"])
def test_a_flipped_bit_in_a_torch_file(command, checkpoint, tmp_path):
    path = Path(shutil.copy(checkpoint, tmp_path / "a.ckpt"))
    flip_weight(path, torch.load(path, weights_only=True)["state_dict"]["model.model.layers.0.mlp.up_proj.weight"])
    trainer = make_trainer(tmp_path, WeightPruning(score="magnitude", progress=False))
    module = CausalLM(config=TINY, lr_schedule="constant")
    with pytest.raises(CheckpointError, match="CRC"):
        {
            "inspect": lambda: inspect(path),
            "export": lambda: export(path, tmp_path / "out", "none"),
            "load": lambda: CausalLM.load_from_checkpoint(path),
            "resume": lambda: trainer.fit(module, loader(), ckpt_path=path),
        }[command]()


def test_a_flipped_bit_in_a_distributed_checkpoint(tmp_path):
    weight = torch.arange(16.0).view(4, 4)
    folder = distributed(tmp_path / "d", state_dict={"v": weight})
    flip_weight(next(folder.glob("*.distcp")), weight)
    with pytest.raises(CheckpointError, match="CRC"):
        dict(open_checkpoint(folder))


def test_files_without_check_sums_are_read(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert inspect(tmp_path / "a.ckpt").sparsity == inspect(checkpoint).sparsity
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert inspect(tmp_path / "old.ckpt").sparsity == inspect(checkpoint).sparsity


@pytest.mark.parametrize("command", ["inspect", "export", "fine-tune"])
def test_a_flipped_bit_in_an_export(command, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "model", "none")
    file = tmp_path / "model" / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    assert CausalLM(str(tmp_path / "model")).model.config.model_type == "llama"
    flip_weight(file, load_file(file)[name])
    with pytest.raises(CheckpointError, match=rf"{name}.*check sum"):
        {
            "inspect": lambda: inspect(tmp_path / "model"),
            "export": lambda: export(tmp_path / "model", tmp_path / "out", "none"),
            "fine-tune": lambda: CausalLM(str(tmp_path / "model")),
        }[command]()


def test_check_sums_change_nothing_else(tmp_path):
    """By safetensors' own reader; every dtype, no elements, no dimensions."""
    tensors = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.zeros(0, 4), "d": torch.tensor(2.5),
        "e": torch.randn(4).to(torch.float8_e4m3fn), "f": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt", "mine": "kept"})
    add_check_sums([tmp_path / "m.safetensors"])
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    from safetensors import safe_open

    with safe_open(tmp_path / "m.safetensors", "pt") as handle:
        assert handle.metadata() | {CHECK_SUMS: ""} == {"format": "pt", "mine": "kept", CHECK_SUMS: ""}
    assert dict(open_checkpoint(tmp_path / "m.safetensors")).keys() == tensors.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_class_of_what_a_file_holds_beside_tensors_is_named(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"made_by": Path("x")}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"could run code \(an object of pathlib\.[\w.]*PosixPath\)"):
        read_resumable(tmp_path / "last.ckpt")
