"""Models whose weights accelerate keeps in main memory or on disk are pruned as if they were loaded whole."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import OffloadedWeightsLoader
from experts_models import make_moe
from tiny import LAYERS, make_llama, make_tokens, snapshot
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_prune import CalibrationError, apply_masks, hold_masks, measure_coverage, prune
from lightning_prune.pruning import offloading
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import ALL_STATISTICS
from lightning_prune.pruning.targets import find_targets, select_layers

IDS = make_tokens(4, 8)
BATCHES = [IDS[:2], IDS[2:]]
PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
# What transformers needs to know of, to save what has hooks.
TWO_PLACES = {"": "cpu", "elsewhere": "disk"}


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    cpu_offload(model, torch.device("cpu"))
    model.hf_device_map = TWO_PLACES
    return model


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    disk_offload(model, str(folder), torch.device("cpu"))
    model.hf_device_map = TWO_PLACES
    return model


def in_checkpoint(model: nn.Module, folder: Path, **options: object) -> nn.Module:
    """Loaded by transformers with a device_map: the weights stay in the files of the checkpoint."""
    model.save_pretrained(folder / "checkpoint", max_shard_size="100KB")
    places = dict.fromkeys(PARTS, "cpu") | {f"model.layers.{i}": "disk" for i in range(2)}
    options = {"offload_folder": str(folder / "away"), "dtype": model.dtype, **options}
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoint", device_map=places, **options)


WAYS = (in_memory, on_disk, in_checkpoint)


def away(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if any(p.is_meta for p in m.parameters(recurse=False))]


def whole(model: nn.Module, folder: Path) -> dict[str, bytes]:
    """The bits of all weights, as anyone who saves and loads the model gets them."""
    model.save_pretrained(folder / "saved")
    return snapshot(AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=model.dtype))


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def two_texts(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return (model(ids).logits[:, -1] - model(ids.flip(1)).logits[:, -1]).square().mean(1)


@pytest.mark.few_fast(5)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("score", "settings"),
    [
        ("wanda", {"sequential": True, "loss_fn": two_texts}),
        ("wanda", {"sequential": True}),
        ("wanda", {"sequential": True, "update": "exact"}),
        ("sparsegpt", {"sequential": True, "pattern": "2:4"}),
        ("wanda", {"allocation": "owl"}),
        ("sparsegpt", {}),
        ("magnitude", {"group": "global"}),
        ("kfac", {}),
        ("kfac", {"sequential": True, "update": "alps"}),
        ("gblm", {"sequential": True}),
    ],
    ids=lambda part: str(part).partition(" at ")[0],  # of a function too, in every process
)
def test_like_a_model_that_is_loaded_whole(way, score, settings, tmp_path):
    expected, model = make_llama(), way(make_llama(), tmp_path)
    before, modules = contents(tmp_path), away(model)
    assert len(modules) >= 18
    found = prune(model, BATCHES, score, num_samples=4, **settings)
    masks = prune(expected, BATCHES, score, num_samples=4, **settings)
    assert list(found) == list(masks)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert {mask.device.type for mask in found.values()} == {"cpu"}
    assert away(model) == modules
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert whole(model, tmp_path) == snapshot(expected)
    assert all(file.read_bytes() == old for file, old in before.items())  # a checkpoint's files are its owner's


@pytest.mark.few_fast(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_statistics_are_those_of_the_naive_loop(way, checkpointed, tmp_path):
    plain = make_llama().double()
    expected = naive.statistics(plain, [{"input_ids": row[None]} for row in IDS], LAYERS)
    model = way(copy.deepcopy(plain), tmp_path)
    if checkpointed:  # by transformers itself
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modules, trained = away(model), [p.requires_grad for p in model.parameters()]
    targets = select_layers(model, offloaded=True).targets
    found = collect(model, [{"input_ids": ids} for ids in BATCHES], targets, ALL_STATISTICS, num_samples=4)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for statistic, value in values.items():
            mine = getattr(found[name], statistic)
            torch.testing.assert_close(mine, torch.from_numpy(value), rtol=1e-10, atol=1e-12)
            assert mine.device.type == "cpu"
    assert away(model) == modules
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(trained)


@pytest.mark.parametrize("sequential", [False, True])
def test_experts(sequential, tmp_path):
    expected, model, ids = make_moe("mixtral"), on_disk(make_moe("mixtral"), tmp_path), make_tokens(4, 8, vocab=32)
    found = prune(model, [ids], "wanda", update="exact", sequential=sequential, num_samples=4)
    masks = prune(expected, [ids], "wanda", update="exact", sequential=sequential, num_samples=4)
    assert any("experts" in name for name in masks)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_again_with_the_zeros_that_are_there(tmp_path):
    model = on_disk(make_llama(), tmp_path)
    first = prune(model, BATCHES, "sparsegpt", sequential=True, num_samples=4)
    files = set(contents(tmp_path))
    prune(model, BATCHES, "wanda", update="exact", sequential=True, num_samples=4)
    assert len(contents(tmp_path)) == len(files)  # what replaces a changed weight takes its file away
    assert not files <= set(contents(tmp_path))
    second = prune(model, score="keep")
    assert all(mask.float().mean() < 0.51 for mask in second.values())
    assert first.keys() == second.keys()


class Counting(OffloadedWeightsLoader):
    """Notes what is read."""

    def __init__(self, loader: OffloadedWeightsLoader) -> None:
        vars(self).update(vars(loader))
        self.reads: list[str] = []

    def __getitem__(self, key: str) -> torch.Tensor:
        self.reads.append(key)
        return super().__getitem__(key)


def watched(model: nn.Module, counter: type[Counting] = Counting) -> Any:
    found = [hook for m in model.modules() if (hook := offloading._hook(m)) is not None]
    counting = counter(found[0].weights_map.dataset)
    for hook in found:
        hook.weights_map.dataset = counting
    return counting


def test_a_block_is_read_once_to_be_pruned_and_once_to_be_masked(tmp_path):
    model = in_checkpoint(make_llama(num_hidden_layers=2), tmp_path)
    counting = watched(model)
    prune(model, [row[None] for row in IDS], "wanda", sequential=True, num_samples=4)
    reads = [counting.reads.count(f"model.layers.1.mlp.{name}_proj.weight") for name in ("up", "gate", "down")]
    assert reads == [2, 2, 2]  # block by block, of however many batches; the mask is applied to what is kept
    # The first is run as well, once, to see what blocks return.
    assert counting.reads.count("model.layers.0.mlp.up_proj.weight") == 3


class Bytes(bytearray):
    """Memory that can be watched."""


class Weighing(Counting):
    """Notes how many bytes of what was read are held, by anyone: a module or autograd."""

    def __init__(self, loader: OffloadedWeightsLoader) -> None:
        super().__init__(loader)
        self.held = self.most = 0

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = super().__getitem__(key)
        memory = Bytes(tensor.numpy().tobytes())
        self.held += len(memory)
        self.most = max(self.most, self.held)
        weakref.finalize(memory, self.let_go, len(memory))
        return torch.frombuffer(memory, dtype=tensor.dtype).reshape(tensor.shape)

    def let_go(self, size: int) -> None:
        self.held -= size


@pytest.mark.slow
@pytest.mark.parametrize("score", ["kfac", "gblm"])
def test_a_backward_pass_holds_the_weights_of_one_block(score, tmp_path):
    model = make_llama(num_hidden_layers=6)
    block, head = (sum(p.nbytes for p in m.parameters()) for m in (model.model.layers[0], model.lm_head))
    weighing = watched(on_disk(model, tmp_path), Weighing)
    prune(model, [IDS], score, num_samples=4)
    reads = weighing.reads.count("model.layers.1.input_layernorm.weight")
    # Forward and backward; two samples had run before, to see whether each has a loss, and gradients, of its own.
    assert reads == {"kfac": 3, "gblm": 4}[score]
    gc.collect()
    assert weighing.held == 0
    assert block <= weighing.most <= block + head + 4096


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


def test_a_layer_that_scales_its_product_is_seen(tmp_path):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.__class__ = Scaled
    with pytest.raises(CalibrationError, match=r"'model.layers.1.mlp.up_proj' changes the product"):
        prune(on_disk(model, tmp_path), BATCHES, "kfac", num_samples=4, targets=["*"])


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["calibration", "layer", "backward", "update", "writing"])
def test_a_failure_leaves_the_weights_as_they_were(way, where, tmp_path, monkeypatch):
    model = way(make_llama(), tmp_path)
    before, files = whole(model, tmp_path), set(contents(tmp_path))
    calls = []

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    layer = model.model.layers[1].mlp.up_proj
    own = layer._old_forward
    if where == "calibration":
        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    elif where == "layer":  # when accelerate has brought its weight
        layer._old_forward = fail
    elif where == "backward":
        hook = layer.register_forward_hook(lambda _, args, output: output.register_hook(fail) and None)
    else:
        name = "prune_with_hessian" if where == "update" else "_keep"
        module = "lightning_prune.pruning." + ("updates" if where == "update" else "offloading")
        real = getattr(__import__(module, fromlist=[name]), name)

        def fail_late(*args, **kwargs):
            calls.append(1)
            if len(calls) == 10:  # in the second block
                raise OSError("no space left")
            return real(*args, **kwargs)

        monkeypatch.setattr(f"{module}.{name}", fail_late)
    modules = away(model)
    late = where in ("update", "writing")
    with pytest.raises((OSError, CalibrationError) if late else KeyboardInterrupt):
        prune(model, BATCHES, "kfac" if where == "backward" else "sparsegpt", sequential=late, num_samples=4)
    assert bool(calls) == late
    layer._old_forward = own
    if where in ("calibration", "backward"):
        hook.remove()
    assert away(model) == modules
    assert set(contents(tmp_path)) == files
    assert whole(model, tmp_path) == before


def test_refused_before_anything_changes(tmp_path):
    tied = in_memory(make_llama(tie_word_embeddings=True), tmp_path)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is tied to another weight"):
        prune(tied, score="magnitude", targets=["lm_head"])
    with pytest.raises(ValueError, match="only `prune` takes it"):
        find_targets(tied)
    name, weight = "model.embed_tokens.weight", tied.lm_head.weight
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool)}
    with pytest.raises(ValueError, match=rf"'{name}' is tied to another weight"):
        apply_masks(tied, masks)
    with pytest.raises(ValueError, match=rf"'{name}' has no data here \(offloaded"):
        hold_masks(tied, masks, torch.optim.SGD(tied.parameters()))
    bare = in_checkpoint(make_llama(), tmp_path, offload_folder=None)
    with pytest.raises(ValueError, match="offload_folder="):
        prune(bare, BATCHES, "wanda", sequential=True, num_samples=4)
    blockless = cpu_offload(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.device("cpu"))
    for score, settings in (("kfac", {}), ("gblm", {}), ("magnitude", {"allocation": "kfac"})):
        with pytest.raises(ValueError, match=r"needs a backward pass, and Sequential names no decoder blocks"):
            prune(blockless, [torch.ones(2, 4)], score, loss_fn=lambda model, x: model(x).sum(1), **settings)
    with torch.device("meta"), pytest.raises(ValueError, match="has no data"):
        prune(make_llama(), score="magnitude")
    with torch.device("meta"):
        empty = make_llama()
    with pytest.raises(ValueError, match=rf"'{name}' has no data here"):
        apply_masks(empty, masks)


def test_coverage_is_that_of_the_whole_model(tmp_path):
    assert measure_coverage(in_memory(make_llama(), tmp_path)) == measure_coverage(make_llama())


def test_a_copy_of_the_model_keeps_its_files(tmp_path):
    model = on_disk(make_llama(), tmp_path)
    prune(model, BATCHES, "sparsegpt", sequential=True, num_samples=4)
    expected = whole(model, tmp_path)
    other = copy.deepcopy(model)
    del model
    assert whole(other, tmp_path) == expected
