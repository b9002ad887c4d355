"""PERPRetraining under FSDP2 with real processes over gloo: trained and merged as under DDP, held as shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import retraining_worker
import torch
from launching import assert_same_on_all_ranks, launch, masks, results, share_of_other_masks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from versions import has

from lightning_prune import CausalLM, load_merged_state
from lightning_prune.checkpoints.export import export
from lightning_prune.pruning.masks import unpack_masks

pytestmark = pytest.mark.distributed

MIXTURES = has("transformers", "5")  # before, experts are layers
# Name: settings. Each is one fit of a few steps under FSDP2, and one under DDP on the same samples.
CASES: dict[str, dict[str, Any]] = {
    "gblm": {"causal_lm": True},
    "kfac": {"score": "kfac", "checkpointing": True, "pruner_first": True},
    "kept zeros": {"pruned_before": True},
    "scale_lora": {"pruned_before": True, "adapter": "scale_lora", "lora_options": {"init_lora_weights": "gaussian"}},
    "hira": {"pruned_before": True, "adapter": "hira"},
    "lora_prune": {"pruned_before": True, "adapter": "lora_prune"},
    "distilled": {"pruned_before": True, "distilled": True},
    "norms alone": {"pruned_before": True, "adapter": None},
    "gpt2": {"pruned_before": True, "family": "gpt2"},
    "head and embedding": {"pruned_before": True, "train": ["bias", "norm", "head", "embedding"]},
    "accumulated and clipped": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}},
    "root only": {"pruned_before": True, "parallel": {"root_only": True}, "leave_gathered": True},
    "gathered once": {"pruned_before": True, "parallel": {"reshard_after_forward": False}, "leave_gathered": True},
    "offload": {"pruned_before": True, "parallel": {"offload": True}},
    "bf16": {"pruned_before": True, "parallel": {"bf16": True}},
    "bf16 and tiny weights": {"pruned_before": True, "tiny": True, "parallel": {"bf16": True}},
    "bf16-mixed": {"pruned_before": True, "trainer": {"precision": "bf16-mixed"}},
    "bf16 model": {"pruned_before": True, "trainer": {"precision": "bf16-true"}},
    # One output and rank one over two ranks: the second holds no row of gate_proj and up_proj, nor of any A.
    "rank without rows": {"pruned_before": True, "intermediate_size": 1, "r": 1},
    "uneven": {"pruned_before": True, "intermediate_size": 5, "r": 3},
    "schedule": {"score": "magnitude", "gradual": True},
    "fit twice": {"twice": True},
    "trained on": {"trained_on": True},
    "functional": {"functional": True},
    "refused": {"refused": True},
}
if MIXTURES:  # and LFM2
    CASES |= {
        "convolutions": {"pruned_before": True, "family": "lfm2"},
        "convolutions cut along their kernel": {"pruned_before": True, "family": "lfm2", "parallel": {"expert_dim": 2}},
        "convolutions, bf16": {"pruned_before": True, "family": "lfm2", "parallel": {"bf16": True}},
        "experts": {"pruned_before": True, "family": "mixtral"},
        "experts, inputs first": {"pruned_before": True, "family": "gpt_oss", "adapter": "hira"},
        "experts cut along their rows": {"pruned_before": True, "family": "mixtral", "parallel": {"expert_dim": 1}},
        "experts cut along their columns": {"pruned_before": True, "family": "gpt_oss", "parallel": {"expert_dim": 2}},
        "experts by kfac": {"score": "kfac", "family": "mixtral", "gradual": True},
        "experts, bf16": {"pruned_before": True, "family": "mixtral", "parallel": {"bf16": True}},
    }
# The same on four ranks, in groups of two that hold copies of each other's shards.
HYBRID: dict[str, dict[str, Any]] = {
    "hybrid schedule": {"score": "magnitude", "gradual": True, "parallel": {"replicas": 2}},
    "hybrid kept zeros": {"pruned_before": True, "parallel": {"replicas": 2}},
}
# What DDP has no like of, or what rounds otherwise there.
_ALONE = ("bf16", "bf16 and tiny weights", "experts, bf16", "convolutions, bf16", "functional", "refused")
_FITS = [
    name for name in CASES if name not in ("norms alone", "trained on", "functional", "refused")
]  # and with adapters

# How shards are laid out, which replicas know nothing of: cases that differ in it alone share a fit of these.
_LAYOUT = ("parallel", "leave_gathered")


def on_replicas(name: str) -> str:
    """The folder of the fit under DDP that a case is compared with."""
    return f"ddp {json.dumps({key: value for key, value in CASES[name].items() if key not in _LAYOUT})}"


def with_steps(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a fit of a few steps; checkpoints of gathered parameters alone are read."""
    steps = 6 if "gradual" in settings else 4  # a schedule goes on until step 4
    trainer = {**settings.get("trainer", {}), "max_steps": steps, "max_epochs": -1}
    return {**settings, "trainer": trainer, "saved": settings.get("leave_gathered", False)}


def start(devices: int, *cases: tuple[Path, str, dict[str, Any]]) -> None:
    done = launch(devices, *cases, run=retraining_worker.run)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks ended with, all cases in one launch."""
    folder = tmp_path_factory.mktemp("retraining")
    sharded = [(folder / name, "fsdp2", with_steps(settings)) for name, settings in CASES.items()]
    compared = {on_replicas(name): settings for name, settings in CASES.items() if name not in _ALONE}
    replicated = [(folder / name, "ddp", with_steps(settings)) for name, settings in compared.items()]
    start(2, *sharded, *replicated)
    return folder


def assert_zeros(state: dict[str, Tensor]) -> None:
    """Pruned weights are +0.0 to the bit, in the model of before the merge and of after."""
    for name, mask in masks(state).items():
        for weight in (state.get("base." + name.removeprefix("mask.")), state["weight." + name.removeprefix("mask.")]):
            if weight is not None:
                bits = torch.int32 if weight.element_size() == 4 else torch.int16
                assert not weight.view(bits)[~mask].any(), name
        assert bool((~mask).any()), name


@pytest.mark.parametrize("name", [name for name in CASES if name != "refused"])
def test_trains_and_merges_as_under_ddp(name: str, folder: Path) -> None:
    ranks = results(folder / name, 2)
    assert_merged_alike(ranks)
    for mask in masks(ranks[0]):  # zeros do not say any more what is kept
        weight = ranks[0][mask.replace("mask.", "weight.")]
        assert not weight[weight == 0].signbit().any(), mask
    if name == "functional":
        assert_is_one_process(folder, ranks)
    if name not in _ALONE:
        # What is rounded to bfloat16 differs by a bit where sums are taken in another order.
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if name.startswith("bf16") else {"rtol": 1e-4, "atol": 1e-5}
        assert_is_ddp(ranks[0], results(folder / on_replicas(name), 2), **tolerance)


def assert_merged_alike(ranks: list[dict[str, Tensor]]) -> None:
    """All ranks have the same whole weights, and every zero."""
    assert_same_on_all_ranks([{n: v for n, v in rank.items() if n != "losses"} for rank in ranks])
    assert_zeros(ranks[0])


def assert_is_ddp(sharded: dict[str, Tensor], ddp: list[dict[str, Tensor]], **tolerance: float) -> None:
    assert_merged_alike(ddp)
    assert share_of_other_masks(ddp[0], sharded) == 0
    for name in (n for n in ddp[0] if n.startswith(("weight.", "losses", "logits"))):
        torch.testing.assert_close(sharded[name], ddp[0][name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_hybrid_shards_train_and_merge_as_under_ddp(tmp_path: Path) -> None:
    strategies = {"hsdp": "", "ddp": " ddp"}
    start(
        4,
        *((tmp_path / f"{n}{end}", s, with_steps(case)) for n, case in HYBRID.items() for s, end in strategies.items()),
    )
    for name in HYBRID:
        ranks = results(tmp_path / name, 4)
        assert_merged_alike(ranks)
        assert_is_ddp(ranks[0], results(tmp_path / f"{name} ddp", 4), rtol=1e-4, atol=1e-5)
        for held in (n for n in ranks[0] if n.startswith("held.") and n.endswith(".kept")):
            weight = ranks[0][held.replace("held.", "weight.").replace(".kept", ".weight")]
            assert [int(rank[held]) for rank in ranks] == [weight.numel() // 2] * 4


def assert_is_one_process(folder: Path, ranks: list[dict[str, Tensor]]) -> None:
    """The loop of two ranks is that of one process on the batches of both."""
    out = folder / "one process"
    out.mkdir()
    retraining_worker.run(out, 1, "single", {"functional": True})
    (one,) = results(out, 1)
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, one["losses"], rtol=1e-5, atol=1e-6)
    assert float(one["losses"][-1]) < float(one["losses"][0])
    for name in (n for n in one if n.startswith(("weight.", "logits"))):
        torch.testing.assert_close(ranks[0][name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "bf16 and tiny weights"])
def test_a_policy_of_bfloat16_trains_nearly_as_float32(name: str, folder: Path) -> None:
    state, exact = results(folder / name, 2)[0], results(folder / on_replicas("kept zeros"), 2)[0]
    assert all(v.dtype == torch.float32 for n, v in state.items() if n.startswith("weight."))
    torch.testing.assert_close(state["losses"], exact["losses"], rtol=5e-3, atol=0.0)
    torch.testing.assert_close(state["logits"], exact["logits"], rtol=5e-2, atol=5e-3, check_dtype=False)


@pytest.mark.parametrize("name", _FITS)
def test_merged_weights_are_those_of_float64_written_out(name: str, folder: Path) -> None:
    state = results(folder / name, 2)[0]
    adapter, rank = CASES[name].get("adapter", "mask_lora"), CASES[name].get("r", 4)
    moved = 0
    for name_of_mask, mask in masks(state).items():
        weight = name_of_mask.removeprefix("mask.")
        layer = weight.removesuffix(".weight")
        base, a, b = (state[n].double() for n in (f"base.{weight}", f"factor.{layer}.A", f"factor.{layer}.B"))
        turned = CASES[name].get("family") == ("gpt_oss" if "experts" in layer else "gpt2")
        product = ((b @ a).mT if turned else b @ a).reshape(base.shape)  # of a convolution its kernel
        combined = {"scale_lora": base * product, "hira": base * (1 + product)}
        expected = combined.get(adapter, base + 2 * mask * product)
        assert rank == a.shape[-2] == b.shape[-1]
        merged = state[f"weight.{weight}"]
        tolerance = {"rtol": 1e-2, "atol": 1e-4} if merged.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(merged.double(), expected, **tolerance)
        assert not torch.equal(merged.double(), base)
        if CASES[name].get("pruned_before") and adapter not in combined:
            moved += int((merged[mask & (base == 0)] != 0).sum())  # what is zero and kept is trained too
            kept = mask
            if "convolutions" in name:  # where a channel's depthwise kernel is pruned whole, nothing has a gradient
                kept = mask & (product != 0)
                assert float((product != 0).double().mean()) > 0.93
            assert float((merged[kept] == 0).double().mean()) < 0.01
    assert moved or not CASES[name].get("pruned_before") or adapter in ("scale_lora", "hira")


@pytest.mark.parametrize("name", _FITS)
def test_every_rank_holds_its_part_alone(name: str, folder: Path) -> None:
    ranks = results(folder / name, 2)
    for held in (n for n in ranks[0] if n.startswith("held.") and n.endswith(".weight")):
        layer = held.removeprefix("held.").removesuffix(".weight")
        weight = f"weight.{layer}" if "experts" in layer else f"weight.{layer}.weight"
        size = ranks[0][weight].numel()
        assert sum(int(rank[held]) for rank in ranks) == size
        for what, total in (("A", f"factor.{layer}.A"), ("B", f"factor.{layer}.B"), ("kept", weight)):
            parts = [int(rank[f"held.{layer}.{what}"]) for rank in ranks]
            if what == "kept" and name == "bf16 and tiny weights" and layer == "model.layers.0.self_attn.o_proj":
                assert parts == [size, size]  # some of its weights vanish in bfloat16, and the mask with them
            else:
                assert sum(parts) == ranks[0][total].numel(), (layer, what)
                assert max(parts) < ranks[0][total].numel() or "rank without" in name, (layer, what)


def test_what_cannot_be_right_is_refused_on_every_rank(folder: Path) -> None:
    for rank in range(2):
        errors = json.loads((folder / "refused" / f"rank{rank}.json").read_text())
        assert "1 weights of 'model.layers.0.mlp.up_proj.weight' are pruned by the mask" in errors["mask of one rank"]
        assert "'model.layers.0.mlp.up_proj' has values that are not finite" in errors["infinite on one rank"]
        assert "sharded (DTensor) already; add adapters first" in errors["sharded before"]
        assert "fully_shard(model.get_base_model())" in errors["PEFT model sharded"]
        assert "on a linear layer without its adapter" in errors["layer sharded"]
        assert "or on experts without theirs" in errors.get("experts sharded", "") or not MIXTURES
        for what in ("layer sharded with its adapter", *(["experts sharded with adapters"] if MIXTURES else [])):
            assert "or on experts with theirs, which the merge takes off" in errors[what]
        assert "build the module anew" in errors["fit after the merge"]
        assert "under SingleDeviceStrategy; use the ModelParallelStrategy" in errors["another strategy"]


def test_tensor_parallelism_is_refused_before_training(tmp_path: Path) -> None:
    done = launch(2, (tmp_path, "tp", {}), run=retraining_worker.run)
    assert done.returncode != 0
    assert "does not support ModelParallelStrategy(tensor_parallel_size=2)" in done.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_masks_are_saved_whole(folder: Path) -> None:
    """Though parameters were gathered when the checkpoint was written."""
    state = torch.load(folder / "root only" / "epoch=0.ckpt" / "meta.pt", weights_only=True)["callbacks"]
    (saved,) = (unpack_masks(s["masks"]) for name, s in state.items() if name.startswith("PERPRetraining"))
    expected = masks(results(folder / "root only", 2)[0])
    assert {f"mask.{name}" for name in saved} == expected.keys()
    assert all(torch.equal(mask, expected[f"mask.{name}"]) for name, mask in saved.items())


def test_a_sharded_and_merged_model_is_saved_whole(folder: Path) -> None:
    state = results(folder / "gblm", 2)[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "gblm" / "model")
    for weight, value in model.named_parameters():
        assert torch.equal(value, state[f"weight.{weight}"]), weight


def test_adapters_are_saved_whole(folder: Path) -> None:
    (file,) = (folder / "functional" / "adapter").glob("perp_adapter-*.safetensors")
    saved = load_file(file)
    assert saved["model.layers.0.mlp.up_proj.lora_A"].shape == (4, 32)
    assert saved["model.layers.0.mlp.up_proj.lora_B"].shape == (64, 4)
    state = results(folder / "functional", 2)[0]
    for name in (n for n in saved if n.endswith("norm.weight")):
        assert torch.equal(saved[name], state[f"weight.{name}"])


STRATEGIES = ("fsdp2", "fsdp2_full_checkpoint")
RUNS: dict[str, dict[str, Any]] = {
    "beside": {"causal_lm": True},
    "alone": {"pruned_before": True},
    "schedule": {"score": "magnitude", "gradual": True, "causal_lm": True},
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fits of two epochs of 6 steps; the second epoch again, from the checkpoint of the first. At two ranks."""
    folder, two = tmp_path_factory.mktemp("resumed"), {"trainer": {"max_epochs": 2}}
    cases = []
    for strategy in STRATEGIES:
        for name, settings in RUNS.items():
            whole, rest = folder / f"{name} {strategy}", folder / f"{name} {strategy} rest"
            cases.append((whole, strategy, {**settings, **two}))
            # The resumed module starts from other weights, and the adapters from another seed.
            again = {"resume": str(whole / "epoch=0.ckpt"), "initial": 7}
            cases.append((rest, strategy, {**settings, **two, **again}))
    start(2, *cases)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RUNS)
def test_resume_is_that_of_an_uninterrupted_run(name: str, strategy: str, resumed: Path) -> None:
    whole, rest = results(resumed / f"{name} {strategy}", 2), results(resumed / f"{name} {strategy} rest", 2)
    for one, other in zip(whole, rest, strict=True):
        assert one.keys() == other.keys()
        for tensor, value in one.items():
            assert torch.equal(value[6:] if tensor == "losses" else value, other[tensor]), tensor
    assert_zeros(rest[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name, settings in RUNS.items() if settings.get("causal_lm")])
def test_a_checkpoint_before_the_merge_exports_the_merged_model(
    name: str, strategy: str, resumed: Path, tmp_path: Path
) -> None:
    found = export(resumed / f"{name} {strategy}" / "epoch=1.ckpt", tmp_path / "exported", progress=False)
    state = results(resumed / f"{name} {strategy}", 2)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert found.masks == 14
    assert found.resurrected == 0
    for weight, value in model.named_parameters():
        torch.testing.assert_close(value, state[f"weight.{weight}"], rtol=1e-5, atol=1e-7)
    for weight, mask in masks(state).items():
        pruned = model.get_parameter(weight.removeprefix("mask."))[~mask]
        assert not pruned.detach().view(torch.int32).any()
    module = CausalLM.load_from_checkpoint(resumed / f"{name} fsdp2_full_checkpoint" / "epoch=1.ckpt")
    for weight, value in module.model.named_parameters():
        torch.testing.assert_close(value.detach(), state[f"weight.{weight}"], rtol=1e-5, atol=1e-7)


def test_checkpoints_of_weights_alone_can_be_merged_too(tmp_path: Path) -> None:
    runs = {"beside": {"causal_lm": True}, "own": {"pruned_before": True}}
    runs |= {"experts": {"pruned_before": True, "family": "gpt_oss"}} if MIXTURES else {}
    cases = {(name, strategy): tmp_path / f"{name} {strategy}" for name in runs for strategy in STRATEGIES}
    start(2, *((path, strategy, {**runs[name], "weights_only": True}) for (name, strategy), path in cases.items()))
    for (name, strategy), path in cases.items():
        state = results(path, 2)[0]
        loaded = load_merged_state(path / "epoch=0.ckpt")
        weights = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
        names = {key.removeprefix("model.") for key in loaded}
        assert names - (set() if name == "experts" else {"lm_head.weight"}) == weights.keys()  # it is tied
        for key, value in loaded.items():
            if key == "model.lm_head.weight" and name != "experts":
                continue
            torch.testing.assert_close(value, weights[key.removeprefix("model.")], rtol=1e-5, atol=1e-7)
        for key, mask in masks(state).items():
            assert not loaded[key.replace("mask.", "model.")].view(torch.int32)[~mask].any()
        if name == "beside":
            assert export(path / "epoch=0.ckpt", tmp_path / f"exported {strategy}", progress=False).masks == 14


def test_resume_at_one_rank(resumed: Path, tmp_path: Path) -> None:
    from_strategy = {**dict(zip(STRATEGIES, STRATEGIES, strict=True)), "ddp": "fsdp2_full_checkpoint"}
    cases = []
    for strategy, source in from_strategy.items():
        again = {"resume": str(resumed / f"beside {source}" / "epoch=1.ckpt"), "initial": 7}
        cases.append((tmp_path / strategy, strategy, {**RUNS["beside"], "trainer": {"max_epochs": 3}, **again}))
    start(1, *cases)
    states = [results(tmp_path / name, 1)[0] for name in from_strategy]
    before = masks(results(resumed / "beside fsdp2", 2)[0])
    for state in states:
        assert_zeros(state)
        assert masks(state).keys() == before.keys()
        assert all(torch.equal(mask, masks(state)[name]) for name, mask in before.items())
        assert len(state["losses"]) == 12
        for tensor, value in state.items():
            torch.testing.assert_close(value, states[0][tensor], rtol=1e-4, atol=1e-6)
