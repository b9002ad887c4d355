"""Every number is compared with a count in numpy, on files written by the libraries that own the formats."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from example_checkpoints import (
    PRUNABLE,
    WRITERS,
    example_state,
    write_ckpt,
    write_distributed,
    write_distributed_flat,
    write_folder,
    write_masked_ckpt,
    write_safetensors,
)
from safetensors.torch import save_file

from lightning_prune.checkpoints.inspection import PATTERNS, inspect
from lightning_prune.errors import CheckpointError
from lightning_prune.naming import is_prunable
from lightning_prune.pruning.masks import pack_masks


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


@pytest.mark.parametrize("write", [write_ckpt, write_distributed])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_gpt2_is_recognized_in_checkpoints_of_lightning(write, tmp_path):
    weight = torch.ones(8, 6)  # (I, O)
    weight[2:4] = weight[6:8] = 0
    masks = pack_masks({"model.transformer.h.0.mlp.c_fc.weight": weight != 0})
    extras = {
        "hyper_parameters": {"config": {"model_type": "gpt2"}, "learning_rate": 0.1},
        "callbacks": {"WeightPruning": {"masks": masks}},
    }
    path = write(tmp_path, {"model.transformer.h.0.mlp.c_fc.weight": weight})
    if path.is_dir():
        torch.save(extras, path / "meta.pt")
    else:
        torch.save(torch.load(path, weights_only=True) | extras, path)
    inspection = inspect(path)
    assert inspection.pattern == "2:4"
    assert (inspection.masks, inspection.resurrected) == (1, 0)


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


@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "pt"])
def test_layers_without_inputs_or_outputs(write, tmp_path):
    """They train, so their file is not damaged; the number of rows of a matrix without columns could be any."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(0, 3), "b": torch.nn.Linear(3, 0), "c": torch.nn.Linear(4, 2)})
    state = {name: p.detach() for name, p in model.named_parameters()} | {"d.weight": torch.zeros(2, 3, 0)}
    write(state, tmp_path / "model.pt")
    found = inspect(tmp_path / "model.pt")
    assert {t.name: t.shape for t in found.tensors} == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert [t.name for t in found.selected()] == ["c.weight"]


def test_a_tensor_larger_than_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_prune.checkpoints.inspection._CHUNK", 40)
    state = example_state()
    check(inspect(write_folder(tmp_path, state)), state)


def test_a_safetensors_file_under_another_name(tmp_path):
    state = example_state()
    check(inspect(write_safetensors(tmp_path, state).rename(tmp_path / "weights")), state)


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
def test_memory_stays_that_of_one_tensor(tmp_path):
    # 16 tensors of 8 MiB; one and its chunks may be there at a time, 128 MiB may not.
    state = {f"layers.{i}.fc.weight": torch.ones(1024, 2048) for i in range(16)}
    paths = [str(write(tmp_path, state)) for write in (write_safetensors, write_ckpt, write_distributed_flat)]
    code = (
        "import resource, sys\n"
        "import torch.distributed.checkpoint\n"
        "from lightning_prune.checkpoints.inspection import inspect\n"
        "def anonymous():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.split('RssAnon:')[1].split()[0]) // 1024\n"
        "import lightning_prune.checkpoints.inspection as module\n"
        "report = module.report_tensor\n"
        "def watched(*args, **kwargs):\n"
        "    global peak\n"
        "    peak = max(peak, anonymous())\n"
        "    return report(*args, **kwargs)\n"
        "module.report_tensor = watched\n"
        f"for path in {paths!r}:\n"
        "    before, peak = anonymous(), 0\n"
        "    assert inspect(path).totals().tensors == 16\n"
        "    print(peak - before)\n"
    )
    # What is freed goes back to the system at once, or the figure depends on how the allocator keeps it.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert len(done.stdout.split()) == len(paths)
    assert all(int(more) < 30 for more in done.stdout.split()), f"{done.stdout} MiB of {paths}"


# -- masks


def test_masks_are_compared(tmp_path):
    inspection = inspect(write_masked_ckpt(tmp_path))
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

    inspection = inspect(write_masked_ckpt(tmp_path, change))
    assert inspection.resurrected == 2
    found = {t.name: (t.mask.resurrected, t.mask.kept_zeros) for t in inspection.tensors if t.mask}
    assert found["model.model.layers.1.mlp.up_proj.weight"] == (2, 0)
    assert found["model.model.layers.1.mlp.down_proj.weight"] == (0, 1)
    assert sum(r + k for r, k in found.values()) == 3


def test_a_mask_is_of_the_tensor_that_has_its_name(tmp_path):
    """Not of another whose name ends alike; and a callback of somebody else's may be called nearly as ours."""
    masks = {"fc.weight": torch.rand(4, 8) > 0.5, "net.fc.weight": torch.rand(4, 8) > 0.5}
    state = {"encoder.fc.weight": torch.ones(8, 4), "fc.weight": masks["fc.weight"].float()}
    state["module.net.fc.weight"] = masks["net.fc.weight"].float()  # its mask is named from further inside
    callbacks = {
        "WeightPruning": {"callback": "WeightPruning", "masks": pack_masks(masks)},
        "WeightPruningStats": {"seen": 3},
    }
    checkpoint = {"state_dict": state, "callbacks": callbacks, "pytorch-lightning_version": "2.6.0"}
    torch.save(checkpoint, tmp_path / "two.ckpt")
    found = {t.name: t.mask for t in inspect(tmp_path / "two.ckpt").tensors}
    assert found["encoder.fc.weight"] is None
    for name, own in (("fc.weight", "fc.weight"), ("module.net.fc.weight", "net.fc.weight")):
        assert (found[name].masked, found[name].resurrected) == (int((~masks[own]).sum()), 0)


def test_masks_that_do_not_fit_or_are_damaged(tmp_path):
    masks = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4, dtype=torch.bool)}
    with pytest.raises(CheckpointError, match="its mask"):
        inspect(write_masked_ckpt(tmp_path, masks=masks))
    path = write_masked_ckpt(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    state = next(iter(checkpoint["callbacks"].values()))
    state["masks"]["model.layers.0.mlp.up_proj.weight"]["bits"][0] ^= 1
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="damaged"):
        inspect(path)
    state["masks"] = 3
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="no masks"):
        inspect(path)


def test_masks_beside_a_distributed_checkpoint(tmp_path):
    state = example_state()
    path = write_distributed(tmp_path, {f"model.{n}": t for n, t in state.items()})
    masks = pack_masks({n: state[n] != 0 for n in PRUNABLE})
    torch.save({"callbacks": {"WeightPruning": {"masks": masks}}, "epoch": 1}, path / "meta.pt")
    inspection = inspect(path)
    assert (inspection.masks, inspection.resurrected) == (len(PRUNABLE), 0)
