"""Every number is compared with a count in numpy, on files written by the libraries that own the formats."""

import collections
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from safetensors.torch import save_file

from lightning_prune.inspection import PATTERNS, InspectionError, inspect, is_prunable, render
from lightning_prune.masks import pack_masks


def example_state(dtype=torch.float32):
    """Two blocks: q_proj is half zeros anywhere, up_proj is 2:4, o_proj is 1:4, down_proj dense with five zeros."""
    generator = torch.Generator().manual_seed(0)
    state = {"model.embed_tokens.weight": torch.randn(20, 16, generator=generator)}
    state["model.embed_tokens.weight"][3] = 0.0
    for i in range(2):
        block = f"model.layers.{i}"
        q = torch.randn(16, 16, generator=generator)
        q[torch.rand(16, 16, generator=generator) < 0.5] = 0.0
        up = torch.randn(24, 16, generator=generator)
        up[:, 0::4] = 0.0
        up[:, 3::4] = -0.0
        o = torch.randn(16, 16, generator=generator)
        o.view(16, 4, 4)[:, :, 1:] = 0.0
        down = torch.randn(16, 24, generator=generator)
        down.view(-1)[:5] = 0.0
        state |= {
            f"{block}.self_attn.q_proj.weight": q,
            f"{block}.self_attn.o_proj.weight": o,
            f"{block}.mlp.up_proj.weight": up,
            f"{block}.mlp.down_proj.weight": down,
            f"{block}.input_layernorm.weight": torch.ones(16),
            f"{block}.self_attn.q_proj.bias": torch.zeros(16),
        }
    state["model.norm.weight"] = torch.ones(16)
    state["lm_head.weight"] = torch.randn(20, 16, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


PRUNABLE = {n for n in example_state() if "_proj.weight" in n}


def naive(tensor):
    """Zeros and the share of conforming groups, by plain loops."""
    array = tensor.double().numpy()
    shares = {}
    for n, m in PATTERNS:
        if array.ndim > 1 and array.shape[-1] % m == 0:
            rows = array.reshape(-1, array.shape[-1])
            groups = [row[i : i + m] for row in rows for i in range(0, len(row), m)]
            shares[f"{n}:{m}"] = sum(np.count_nonzero(g) <= n for g in groups) / len(groups)
    return int((array == 0).sum()), shares


def check(inspection, state, prefix=""):
    reports = {t.name: t for t in inspection.tensors}
    assert set(reports) == {prefix + n for n in state}
    for name, tensor in state.items():
        report = reports[prefix + name]
        zeros, shares = naive(tensor)
        assert (report.zeros, report.numel, report.shape) == (zeros, tensor.numel(), tuple(tensor.shape)), name
        assert report.dtype == str(tensor.dtype).removeprefix("torch.")
        assert report.patterns == pytest.approx(shares)
        assert report.prunable == (name in PRUNABLE), name
    zeros = sum(naive(state[n])[0] for n in PRUNABLE)
    numel = sum(state[n].numel() for n in PRUNABLE)
    assert inspection.totals().zeros == zeros
    assert inspection.sparsity == zeros / numel
    assert inspection.totals(True).numel == sum(t.numel() for t in state.values())


def write_safetensors(folder, state):
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_folder(folder, state):
    write_safetensors(folder, state)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_shards(folder, state):
    names = list(state)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({n: state[n] for n in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_bin(folder, state):
    torch.save(collections.OrderedDict(state), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def write_old_bin(folder, state):
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"


def write_bin_folder(folder, state):
    write_bin(folder, state)
    return folder


def write_bin_shards(folder, state):
    names = list(state)
    for i in range(2):
        torch.save({n: state[n] for n in names[i::2]}, folder / f"part{i}.bin")
    weight_map = {n: f"part{i % 2}.bin" for i, n in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_ckpt(folder, state):
    file = folder / "last.ckpt"
    optimizer = {"state": {0: {"exp_avg": torch.zeros(5, 5)}}, "param_groups": []}
    checkpoint = {"pytorch-lightning_version": "2.6.0", "state_dict": state, "optimizer_states": [optimizer]}
    torch.save(checkpoint, file)
    return file


def write_distributed(folder, state):
    optimizer = {"state": {n: {"exp_avg": torch.zeros_like(t), "step": 3} for n, t in state.items()}}
    whole = {"state_dict": state, "optimizer_0": optimizer, "note": "text"}
    dcp.save(whole, checkpoint_id=folder / "d.ckpt", no_dist=True)
    return folder / "d.ckpt"


def write_distributed_flat(folder, state):
    dcp.save(dict(state), checkpoint_id=folder / "flat", no_dist=True)
    return folder / "flat"


WRITERS = [
    write_safetensors,
    write_folder,
    write_shards,
    write_bin,
    write_old_bin,
    write_bin_folder,
    write_bin_shards,
    write_ckpt,
    write_distributed,
    write_distributed_flat,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_format_gives_the_counts_of_numpy(write, dtype, tmp_path):
    state = example_state(dtype)
    path = write(tmp_path, state)
    inspection = inspect(path)
    check(inspection, state)
    assert inspection.path == str(path)
    assert inspection.bytes_on_disk == sum(
        os.path.getsize(f)
        for f in ([path] if path.is_file() else path.iterdir())
        if f.suffix in (".safetensors", ".bin", ".ckpt", ".distcp")
    )


def test_format_names(tmp_path):
    state = example_state()
    for write, name in [
        (write_folder, "safetensors"),
        (write_bin, "state dict"),
        (write_ckpt, "Lightning checkpoint"),
        (write_distributed, "distributed checkpoint"),
    ]:
        (tmp_path / write.__name__).mkdir()
        assert inspect(write(tmp_path / write.__name__, state)).format == name


def test_strictest_pattern_of_each_tensor(tmp_path):
    inspection = inspect(write_folder(tmp_path, example_state()))
    patterns = {t.name: t.pattern for t in inspection.selected()}
    assert patterns["model.layers.0.self_attn.o_proj.weight"] == "1:4"
    assert patterns["model.layers.0.mlp.up_proj.weight"] == "2:4"
    assert patterns["model.layers.0.mlp.down_proj.weight"] is None
    assert inspection.pattern is None


def test_4_8_without_2_4(tmp_path):
    weight = torch.ones(8, 16)
    weight.view(8, 2, 8)[:, :, 4:] = 0  # four in a row: 4:8, and not 2:4
    save_file({"0.weight": weight, "2.weight": weight.clone()}, tmp_path / "a.safetensors")
    inspection = inspect(tmp_path / "a.safetensors")
    assert inspection.pattern == "4:8"
    assert inspection.tensors[0].patterns == {"1:4": 0.5, "2:4": 0.5, "4:8": 1.0}
    assert list(inspection.blocks()) == ["0", "2"]


def test_blocks_are_summed_and_in_order_of_number(tmp_path):
    state = {f"h.{i}.fc.weight": torch.eye(4) for i in range(12)} | {"out.weight": torch.ones(4, 4)}
    save_file(state, tmp_path / "a.safetensors")
    blocks = inspect(tmp_path / "a.safetensors").blocks()
    assert list(blocks) == [f"h.{i}" for i in range(12)] + [""]
    assert (blocks["h.3"].zeros, blocks["h.3"].numel, blocks[""].sparsity) == (12, 16, 0.0)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 8), torch.bfloat16, True),
        ("features.0.weight", (8, 3, 3, 3), torch.float32, True),
        ("base_model.model.layers.0.q_proj.base_layer.weight", (8, 8), torch.float32, True),
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", (8, 8), torch.float32, False),
        ("transformer.wte.weight", (50, 8), torch.float32, False),
        ("transformer.wpe.weight", (50, 8), torch.float32, False),
        ("transformer.h.0.ln_1.weight", (8,), torch.float32, False),
        ("gpt_neox.embed_in.weight", (50, 8), torch.float32, False),
        ("embed_out.weight", (50, 8), torch.float32, False),
        ("model.decoder.embed_positions.weight", (50, 8), torch.float32, False),
        ("model.layers.0.self_attn.q_norm.weight", (8, 8), torch.float32, False),
        ("model.layers.0.self_attn.q_proj.bias", (8, 8), torch.float32, False),
        ("model.layers.0.mlp.gate.qweight", (8, 8), torch.int32, False),
        ("lm_head.weight", (50, 8), torch.float32, False),
        ("enormous.weight", (8, 8), torch.float32, True),
    ],
)
def test_which_tensors_are_prunable(name, shape, dtype, expected):
    assert is_prunable(name, shape, dtype) is expected


def test_gpt2_groups_run_along_the_first_dimension(tmp_path):
    weight = torch.ones(8, 6)  # (I, O)
    weight[2:4] = weight[6:8] = 0
    save_file({"transformer.h.0.attn.c_attn.weight": weight}, tmp_path / "model.safetensors")
    assert inspect(tmp_path).tensors[0].patterns == {}  # six columns: no M divides them
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert inspect(tmp_path).tensors[0].pattern == "2:4"


def test_convolution_groups_run_along_the_input_channels(tmp_path):
    weight = torch.ones(3, 8, 5, 5)
    weight[:, 0::2] = 0
    save_file({"conv.weight": weight}, tmp_path / "model.safetensors")
    assert inspect(tmp_path).tensors[0].pattern == "2:4"


def test_tied_weights_are_counted_once(tmp_path):
    shared = torch.randn(10, 4)
    state = {"model.embed.weight": shared, "lm_head.weight": shared, "model.fc.weight": torch.zeros(4, 4)}
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": state}, tmp_path / "a.ckpt")
    inspection = inspect(tmp_path / "a.ckpt")
    assert {t.name: t.tied_to for t in inspection.tensors}["lm_head.weight"] == "model.embed.weight"
    assert inspection.totals(True).numel == 56


def test_float8_and_integers_and_bool_and_scalars(tmp_path):
    eight = torch.tensor([[0.0, -0.0, 1.0, 2.0], [0.0, 0.5, -1.0, 0.0]]).to(torch.float8_e4m3fn)
    state = {
        "a.weight": eight,
        "q.qweight": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "flag": torch.tensor([True, False]),
        "scale": torch.tensor(0.0),
        "empty": torch.empty(0, 4),
    }
    save_file(state, tmp_path / "a.safetensors")
    reports = {t.name: t for t in inspect(tmp_path / "a.safetensors").tensors}
    assert [reports[n].zeros for n in state] == [4, 1, 1, 1, 0]
    assert [n for n in state if reports[n].prunable] == ["a.weight"]


def test_a_tensor_larger_than_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_prune.inspection._CHUNK", 40)
    state = example_state()
    check(inspect(write_folder(tmp_path, state)), state)


# -- masks


def with_masks(tmp_path, change=None, masks=None):
    state = example_state()
    if masks is None:
        masks = {n: state[n] != 0 for n in sorted(PRUNABLE)}
    if change:
        change(state)
    checkpoint = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.{n}": t for n, t in state.items()},
        "callbacks": {"WeightPruning{'score': 'gblm'}": {"masks": pack_masks(masks)}, "ModelCheckpoint": {}},
    }
    torch.save(checkpoint, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_masks_are_compared(tmp_path):
    inspection = inspect(with_masks(tmp_path))
    assert inspection.masks == len(PRUNABLE)
    assert inspection.resurrected == 0
    state = example_state()
    masked = {t.name: t.mask.masked for t in inspection.tensors if t.mask}
    assert masked == {f"model.{n}": naive(state[n])[0] for n in PRUNABLE}
    assert inspection.to_dict()["masks"]["masked"] == sum(masked.values())


def test_resurrected_weights_are_found(tmp_path):
    def change(state):
        weight = state["model.layers.1.mlp.up_proj.weight"]
        weight[0, 0] = weight[5, 4] = 1e-30
        state["model.layers.1.mlp.down_proj.weight"][-1, -1] = 0.0

    inspection = inspect(with_masks(tmp_path, change))
    assert inspection.resurrected == 2
    found = {t.name: (t.mask.resurrected, t.mask.kept_zeros) for t in inspection.tensors if t.mask}
    assert found["model.model.layers.1.mlp.up_proj.weight"] == (2, 0)
    assert found["model.model.layers.1.mlp.down_proj.weight"] == (0, 1)
    assert sum(r + k for r, k in found.values()) == 3
    assert "Masks broken" in text_of(inspection)


def test_masks_that_do_not_fit_or_are_damaged(tmp_path):
    masks = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4, dtype=torch.bool)}
    with pytest.raises(InspectionError, match="its mask"):
        inspect(with_masks(tmp_path, masks=masks))
    path = with_masks(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    state = next(iter(checkpoint["callbacks"].values()))
    state["masks"]["model.layers.0.mlp.up_proj.weight"]["bits"][0] ^= 1
    torch.save(checkpoint, path)
    with pytest.raises(InspectionError, match="damaged"):
        inspect(path)
    state["masks"] = 3
    torch.save(checkpoint, path)
    with pytest.raises(InspectionError, match="no masks"):
        inspect(path)


def test_masks_beside_a_distributed_checkpoint(tmp_path):
    state = example_state()
    path = write_distributed(tmp_path, {f"model.{n}": t for n, t in state.items()})
    masks = pack_masks({n: state[n] != 0 for n in PRUNABLE})
    torch.save({"callbacks": {"WeightPruning": {"masks": masks}}, "epoch": 1}, path / "meta.pt")
    inspection = inspect(path)
    assert (inspection.masks, inspection.resurrected) == (len(PRUNABLE), 0)


# -- what must not be opened, or cannot be read


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
    with pytest.raises(InspectionError, match="is not opened"):
        inspect(path)
    assert not Path("exploded").exists()


def test_a_hostile_type_inside_distributed_metadata(tmp_path):
    path = write_distributed(tmp_path, example_state())
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = {"x": Bomb()}
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(InspectionError, match=r"refused type (posix|nt)\.system"):
        inspect(path)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.98])
def test_cut_off_files_give_one_clear_error(write, keep, tmp_path):
    path = write(tmp_path, example_state())
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.name != "config.json"]
    victim = max(files, key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: int(victim.stat().st_size * keep)])
    with pytest.raises(InspectionError) as error:
        inspect(path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_cut_off_distributed_index(tmp_path):
    path = write_distributed(tmp_path, example_state())
    data = (path / ".metadata").read_bytes()
    for length in (0, 1, 50, len(data) // 2, len(data) - 1):
        (path / ".metadata").write_bytes(data[:length])
        with pytest.raises(InspectionError):
            inspect(path)


def test_random_bytes(tmp_path):
    for suffix in (".safetensors", ".ckpt", ".bin", ""):
        file = tmp_path / f"noise{suffix}"
        file.write_bytes(np.random.default_rng(0).bytes(5000))
        with pytest.raises(InspectionError):
            inspect(file)


def test_missing_pieces(tmp_path):
    with pytest.raises(InspectionError, match="does not exist"):
        inspect(tmp_path / "nothing")
    with pytest.raises(InspectionError, match="is a folder without"):
        inspect(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InspectionError, match="GGUF"):
        inspect(tmp_path / "a.gguf")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(InspectionError, match="holds a list"):
        inspect(tmp_path / "list.bin")
    torch.save({"lr": 1.0}, tmp_path / "numbers.bin")
    with pytest.raises(InspectionError, match="no tensors"):
        inspect(tmp_path / "numbers.bin")
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards, example_state())
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InspectionError, match="ghost"):
        inspect(shards)
    index["weight_map"]["ghost.weight"] = "../a.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InspectionError, match="outside"):
        inspect(shards)
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InspectionError, match=r"00002-of-00003\.safetensors, which is missing"):
        inspect(shards)


def test_a_safetensors_file_under_another_name(tmp_path):
    state = example_state()
    check(inspect(write_safetensors(tmp_path, state).rename(tmp_path / "weights")), state)


# -- output


def text_of(inspection, all_tensors=False, width=160):
    out = io.StringIO()
    render(inspection, Console(file=out, width=width), all_tensors)
    return out.getvalue()


def test_tables(tmp_path):
    inspection = inspect(write_folder(tmp_path, example_state()))
    text = text_of(inspection)
    assert f"{inspection.sparsity:.2%}" in text
    assert "by block of model.layers" in text
    assert "lm_head" not in text
    everything = text_of(inspection, all_tensors=True)
    assert "lm_head.weight" in everything
    assert "16x24" in everything
    assert text_of(inspection, width=60)


def test_json_is_plain(tmp_path):
    state = example_state()
    inspection = inspect(write_folder(tmp_path, state))
    plain = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert {t["name"] for t in plain["tensors"]} == PRUNABLE
    assert math.isclose(plain["prunable"]["sparsity"], inspection.sparsity)
    assert len(inspection.to_dict(True)["tensors"]) == len(state)
    assert plain["masks"] is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("write", ["safetensors", "ckpt", "distributed"])
def test_memory_stays_that_of_one_tensor(write, tmp_path):
    # 16 tensors of 8 MiB; one and its chunks may be there at a time, 128 MiB may not.
    state = {f"layers.{i}.fc.weight": torch.ones(1024, 2048) for i in range(16)}
    path = {"safetensors": write_safetensors, "ckpt": write_ckpt, "distributed": write_distributed_flat}[write](
        tmp_path, state
    )
    code = (
        "import resource, sys\n"
        "import torch.distributed.checkpoint\n"
        "from lightning_prune.inspection import inspect\n"
        "def anonymous():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.split('RssAnon:')[1].split()[0]) // 1024\n"
        "import lightning_prune.inspection as module\n"
        "report, before, peak = module._report, anonymous(), 0\n"
        "def watched(*args):\n"
        "    global peak\n"
        "    peak = max(peak, anonymous())\n"
        "    return report(*args)\n"
        "module._report = watched\n"
        f"assert inspect({str(path)!r}).totals().tensors == 16\n"
        "print(peak - before)\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert int(done.stdout) < 60, f"{done.stdout} MiB"
