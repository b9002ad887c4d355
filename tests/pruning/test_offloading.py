"""Models whose weights accelerate keeps in main memory or on disk are pruned as if they were loaded whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import OffloadedWeightsLoader
from experts_models import make_moe
from tiny import make_llama, make_tokens, snapshot
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_prune import CalibrationError, apply_masks, hold_masks, measure_coverage, prune
from lightning_prune.pruning import offloading
from lightning_prune.pruning.targets import find_targets

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


@pytest.mark.few_fast(9)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("score", "settings"),
    [
        ("wanda", {"sequential": True}),
        ("wanda", {"sequential": True, "update": "exact"}),
        ("sparsegpt", {"sequential": True, "pattern": "2:4"}),
        ("wanda", {"allocation": "owl"}),
        ("sparsegpt", {}),
        ("magnitude", {"group": "global"}),
    ],
    ids=str,
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


def watched(model: nn.Module) -> Counting:
    found = [hook for m in model.modules() if (hook := offloading._hook(m)) is not None]
    counting = Counting(found[0].weights_map.dataset)
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["calibration", "update", "writing"])
def test_a_failure_leaves_the_weights_as_they_were(way, where, tmp_path, monkeypatch):
    model = way(make_llama(), tmp_path)
    before, files = whole(model, tmp_path), set(contents(tmp_path))
    hook, calls = None, []
    if where == "calibration":

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
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
    with pytest.raises(KeyboardInterrupt if where == "calibration" else (OSError, CalibrationError)):
        prune(model, BATCHES, "sparsegpt", sequential=True, num_samples=4)
    assert hook is None or len(calls) == 0
    if hook is not None:
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
    for score, settings in (("kfac", {}), ("gblm", {"sequential": True}), ("magnitude", {"allocation": "kfac"})):
        with pytest.raises(ValueError, match=r"backward pass.*sequential=True"):
            prune(bare, BATCHES, score, **settings)
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
