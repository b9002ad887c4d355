"""One small sparse state, and functions that write it in every format with the library that owns the format."""

import collections
import json

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from lightning_prune.pruning.masks import pack_masks


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
    dcp.save(whole, checkpoint_id=folder / "d.ckpt")
    return folder / "d.ckpt"


def write_distributed_flat(folder, state):
    dcp.save(dict(state), checkpoint_id=folder / "flat")
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


def write_masked_ckpt(tmp_path, change=None, masks=None):
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
