"""What is opened, and above all what is not: damaged files, and files that would run code."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from example_checkpoints import (
    PRUNABLE,
    WRITERS,
    example_state,
    write_bin,
    write_ckpt,
    write_distributed,
    write_folder,
    write_masked_ckpt,
    write_shards,
)
from safetensors.torch import save_file
from tiny import make_llama
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from transformers import AutoModelForCausalLM

from lightning_prune import CausalLM, benchmark, export, load_masks, load_merged_state, save_masks
from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.checkpoints.mask_files import export_masks
from lightning_prune.checkpoints.reading import check_loads_safely, open_checkpoint
from lightning_prune.errors import CheckpointError
from lightning_prune.report import report


def test_format_names(tmp_path):
    state = example_state()
    for write, name in [
        (write_folder, "safetensors"),
        (write_bin, "state dict"),
        (write_ckpt, "Lightning checkpoint"),
        (write_distributed, "distributed checkpoint"),
    ]:
        (tmp_path / write.__name__).mkdir()
        assert open_checkpoint(write(tmp_path / write.__name__, state)).format == name


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "folder/.metadata"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_never_run(name, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    if name.endswith(".metadata"):
        Path(name).write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"state_dict": Bomb()}, name, _use_new_zipfile_serialization=zipped)
    path = Path(name).parent if name.endswith(".metadata") else Path(name)
    with pytest.raises(CheckpointError, match="is not opened"):
        inspect(path)
    assert not Path("exploded").exists()


def test_a_hostile_type_inside_distributed_metadata(tmp_path):
    path = write_distributed(tmp_path, example_state())
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = {"x": Bomb()}
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"refused type (posix|nt)\.system"):
        inspect(path)


def test_an_index_that_an_early_python_3_11_wrote(tmp_path, monkeypatch):
    """Which pickles members of enumerations by their names, with getattr (3.11.2 does, 3.11.7 does not)."""
    path = write_distributed(tmp_path, example_state())
    found, index = inspect(path).tensors, pickle.loads((path / ".metadata").read_bytes())
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
    written = pickle.dumps(index)
    assert b"getattr" in written
    (path / ".metadata").write_bytes(written)
    assert inspect(path).tensors == found
    for kind, name in ((_MEM_FORMAT_ENCODING, "mro"), (torch.Size, "numel"), (dict, "fromkeys")):
        index.planner_data = {"x": Attribute(kind, name)}
        (path / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(CheckpointError, match=f"refused (type|attribute '{name}')"):
            inspect(path)


class Attribute:
    """Pickled as an attribute of something."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.98])
def test_cut_off_files_give_one_clear_error(write, keep, tmp_path):
    path = write(tmp_path, example_state())
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.name != "config.json"]
    victim = max(files, key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: int(victim.stat().st_size * keep)])
    with pytest.raises(CheckpointError) as error:
        inspect(path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_cut_off_distributed_index(tmp_path):
    path = write_distributed(tmp_path, example_state())
    data = (path / ".metadata").read_bytes()
    for length in (0, 1, 50, len(data) // 2, len(data) - 1):
        (path / ".metadata").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            inspect(path)


def test_random_bytes(tmp_path):
    for suffix in (".safetensors", ".ckpt", ".bin", ""):
        file = tmp_path / f"noise{suffix}"
        file.write_bytes(np.random.default_rng(0).bytes(5000))
        with pytest.raises(CheckpointError):
            inspect(file)


@pytest.mark.parametrize("content", [b"Some text.\n", b'{"a": 1}', b"\x93NUMPY\x01\x00"])
def test_what_is_no_checkpoint_is_called_so(content, tmp_path):
    """Not a danger: nothing in a text could run."""
    for name in ("notes.txt", "model.bin", "last.ckpt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: is no checkpoint: neither a safetensors file nor one"):
            inspect(tmp_path / name)


def test_missing_pieces(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a folder without"):
        inspect(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF"):
        inspect(tmp_path / "a.gguf")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        inspect(tmp_path / "list.bin")
    torch.save({"lr": 1.0}, tmp_path / "numbers.bin")
    with pytest.raises(CheckpointError, match="no tensors"):
        inspect(tmp_path / "numbers.bin")
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards, example_state())
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ghost"):
        inspect(shards)
    index["weight_map"]["ghost.weight"] = "../a.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        inspect(shards)
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors, which is missing"):
        inspect(shards)
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds 2 of the 00003 shards model-\*"):
        inspect(shards)


@pytest.mark.parametrize("binary", [False, True])
def test_shards_that_are_not_what_their_index_says(binary, tmp_path):
    state = example_state()
    save, ending = (torch.save, "bin") if binary else (save_file, "safetensors")
    stem = "pytorch_model" if binary else "model"
    names, files = list(state), [f"{stem}-{i}-of-00002.{ending}" for i in ("00001", "00002")]
    parts = [{name: state[name] for name in names[:5]}, {name: state[name] for name in names[5:]}]

    def write():
        for file, part in zip(files, parts, strict=True):
            save(part, tmp_path / file)
        where = {name: files[int(i >= 5)] for i, name in enumerate(names)}
        (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": where}))

    write()
    assert len(inspect(tmp_path).tensors) == len(state)
    lost = parts[1].pop(names[-1])
    write()
    with pytest.raises(CheckpointError, match=f"lists 1 tensors that the shards do not hold, such as '{names[-1]}'"):
        inspect(tmp_path)
    parts[1] |= {names[-1]: lost, names[0]: torch.zeros_like(state[names[0]])}
    write()
    with pytest.raises(CheckpointError, match=f"holds '{names[0]}' in 2 files"):
        inspect(tmp_path)


def test_variants(tmp_path):
    """Which transformers loads with variant="fp16"."""
    model = make_llama()
    for name, size in (("whole", "1GB"), ("shards", "60KB")):
        folder = tmp_path / name
        model.save_pretrained(folder, variant="fp16", max_shard_size=size)
        export(folder, tmp_path / f"{name}-out", progress=False)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out").state_dict()
        assert all(torch.equal(tensor, found[own]) for own, tensor in model.state_dict().items())
        with pytest.raises(CheckpointError, match=r"does not look for by itself, model\.fp16.*; write .* export .*"):
            CausalLM(str(folder))
    binary = tmp_path / "variant bin"
    binary.mkdir()
    model.config.save_pretrained(binary)
    file = binary / "pytorch_model.fp16.bin"
    torch.save(model.state_dict(), file)
    for number, source in enumerate((binary, file)):
        export(source, tmp_path / f"variant-{number}", progress=False)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"variant-{number}").state_dict()
        assert all(torch.equal(tensor, found[own]) for own, tensor in model.state_dict().items())
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.fp16\.bin \(a.*lightning-prune export '.*variant bin' F"
    ):
        CausalLM(str(binary))
    torch.save(model.state_dict(), binary / "pytorch_model.other.bin")
    with pytest.raises(CheckpointError, match=r"is a folder without .*; did you mean '.*pytorch_model\.fp16\.bin'"):
        inspect(binary)
    # Beside shards of another model, which the index does not name.
    make_llama(1).save_pretrained(tmp_path / "shards", variant="old", max_shard_size="60KB")
    (tmp_path / "shards" / "model.safetensors.index.old.json").unlink()
    index = tmp_path / "shards" / "model.safetensors.index.fp16.json"
    assert inspect(tmp_path / "shards").tensors == inspect(index).tensors
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"is a folder without .*; did you mean '.*shards'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("files", ["whole, index", "index, whole", "whole, bin"])
def test_of_several_models_in_a_folder_the_one_that_transformers_reads(files, tmp_path):
    for seed, kind in enumerate(files.split(", ")):
        model = make_llama(seed)
        if kind == "bin":
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        else:
            model.save_pretrained(tmp_path, max_shard_size="60KB" if kind == "index" else "1GB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    found = open_checkpoint(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    with pytest.raises(CheckpointError, match=r"model.safetensors may not be read by this user"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_home_is_expanded_in_every_path(kind, tmp_path, monkeypatch):
    """Nothing is written into a folder that is called ~ itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_llama().save_pretrained(tmp_path / "model")
    write_masked_ckpt(tmp_path)
    home = lambda name: kind(f"~/{name}")  # noqa: E731
    assert inspect(home("model"), progress=False).totals(True).numel
    export(home("model"), home("exported"), progress=False)
    assert export_masks(home("a.ckpt"), home("masks.safetensors")) == len(PRUNABLE)
    save_masks(load_masks(home("masks.safetensors")), home("again.safetensors"))
    report(home("model"), home("page.html"), dense=home("exported"), progress=False)
    assert load_merged_state(home("a.ckpt")).keys() == load_merged_state(tmp_path / "a.ckpt").keys()
    check_loads_safely(home("a.ckpt"))
    assert CausalLM(home("model")).save_pretrained(home("saved")) is None
    speed = benchmark(home("model"), prompt_tokens=4, new_tokens=2, repeats=2, warmup=0, progress=False)
    assert speed.models[0].file_bytes
    written = {"exported", "masks.safetensors", "again.safetensors", "page.html", "saved"}
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file() and file.parts[-2] != "model"} == {
        mode
    }
    assert {file.name for file in tmp_path.iterdir()} == {"here", "plain", "model", "a.ckpt", *written}
    assert not list((tmp_path / "here").iterdir())


def test_a_folder_whose_files_vanish_is_refused_as_any_other(tmp_path, monkeypatch):
    """What might have been meant is looked for in it, and in folders such as /proc goes away meanwhile."""

    def gone(folder):
        raise FileNotFoundError(2, "No such file or directory", "/proc/4711")

    monkeypatch.setattr("lightning_prune.checkpoints.reading.checkpoints_of_runs", gone)
    with pytest.raises(CheckpointError, match=r"is a folder without .* distributed checkpoint$"):
        open_checkpoint(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_pickle_of_another_protocol_is_refused_without_a_warning(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(CheckpointError, match="is not opened"):
        open_checkpoint(tmp_path / "a.pkl")
