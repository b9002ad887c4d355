"""A model that shrinks as shards of FSDP2, with real processes over gloo: the choices and weights of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sharded_shrinking_worker as worker
import torch
from launching import launch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prune import CausalLM
from lightning_prune.checkpoints.export import export
from lightning_prune.structure.shrinking import Shrinking

pytestmark = pytest.mark.distributed

ALL = {"hidden_size": 28, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
FEWER = {"intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
GPT2 = {
    "model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 50, "n_positions": 32,
    "initializer_range": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
# Name: settings of two ranks, and of one process on the same batches.
CASES: dict[str, dict[str, Any]] = {
    "taylor2": {"target": ALL, "end": 16},
    "kfac, accumulation, gradient checkpointing": {
        "target": ALL, "end": 8, "saliency": "kfac", "saliency_decay": 0.5,
        "trainer": {"accumulate_grad_batches": 2}, "module": {"gradient_checkpointing": True},
    },
    "variant B, kfac": {"target": ALL, "end": 16, "saliency": "kfac", "second_order": True, "second_order_every": 2},
    "variant B, distillation": {
        "target": 0.6, "end": 16, "second_order": True, "second_order_every": 2, "distilled": True,
    },
    "layers, clipping, reached early": {
        "target": FEWER, "types": ["attention", "ffn", "layer"], "end": 11, "compact_every": 2,
        "trainer": {"gradient_clip_val": 0.5}, "module": {"cpu_offload": True, "reshard_after_forward": False},
    },
    "layers with biases": {
        "config": {"attention_bias": True, "mlp_bias": True}, "types": ["ffn", "layer"], "end": 11, "compact_every": 2,
        "target": {"intermediate_size": 40, "num_hidden_layers": 1},
    },
    "query heads, variant B": {
        "target": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 44}, "end": 12,
        "types": ["attention", "ffn"], "attention_unit": "head", "second_order": True, "second_order_every": 1,
    },
    "magnitude, fit twice": {"target": 0.6, "end": 12, "saliency": "magnitude", "epochs": 2, "again": 4},
    # Its shards are pieces of rows, and 50 does not divide into them.
    "gpt2, variant B, kfac": {
        "config": GPT2, "target": {"intermediate_size": 29}, "types": ["ffn"], "end": 14, "saliency": "kfac",
        "second_order": True, "second_order_every": 1,
    },
}  # fmt: skip
ROUNDED: dict[str, Any] = {
    "target": ALL, "end": 14, "second_order": True, "second_order_every": 2, "trainer": {"precision": "bf16-mixed"},
}  # fmt: skip
TAYLOR2, LAYERS = CASES["taylor2"], CASES["layers, clipping, reached early"]
AGAIN: dict[str, Any] = {"initial": 7}  # resumed modules start from other weights


def same_steps(history: list[dict[str, Any]]) -> list[Any]:
    return [(r["step"], r["tokens"], r["units"]) for r in history]


def read(folder: Path, rank: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    return load_file(folder / f"rank{rank}.safetensors"), json.loads((folder / f"rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in one process.

    Slicing hidden channels off rescales weights, which changes Adam's next steps; where they go, it waits for the end.
    """
    folder = tmp_path_factory.mktemp("single")
    for name, settings in CASES.items():
        (folder / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if "types" not in settings:
                patch.setattr(Shrinking, "compaction_due", False)
            worker.run(folder / name, 1, "single", settings)
    return folder


@pytest.fixture(scope="module")
def folder(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case at two ranks in the same processes, resumed runs, and what is refused."""
    folder = tmp_path_factory.mktemp("sharded")
    cases = [(folder / name, "fsdp2", settings) for name, settings in CASES.items()]
    for strategy in ("fsdp2", "fsdp2_full_checkpoint"):
        settings = {**CASES["variant B, kfac"], "leave_gathered": True}
        resume = {"resume": str(folder / strategy / "epoch=1.ckpt"), **AGAIN}
        cases += [(folder / strategy, strategy, settings), (folder / f"{strategy} rest", strategy, settings | resume)]
    done = {"resume": str(folder / "taylor2" / "epoch=3.ckpt"), **AGAIN}
    foreign = {"resume": str(single / "taylor2" / "epoch=1.ckpt"), "refused": True}
    other = {"resume": str(folder / "full" / "epoch=1.ckpt"), "refused": True, "config": {"intermediate_size": 63}}
    cases += [
        (folder / "nothing left", "fsdp2", {**TAYLOR2, **done}),
        (folder / "without the callback", "fsdp2", {**TAYLOR2, **done, "alone": True, "epochs": 6}),
        (folder / "full", "fsdp2_full_checkpoint", LAYERS),
        (folder / "under DDP", "ddp", {**LAYERS, "resume": str(folder / "full" / "epoch=1.ckpt"), **AGAIN}),
        (folder / "bf16-mixed", "fsdp2", ROUNDED),
        (folder / "foreign", "fsdp2", {**TAYLOR2, **foreign}),
        (folder / "other sizes", "fsdp2", {**LAYERS, **other}),
        (folder / "averaged", "fsdp2", {"target": 0.5, "refused": True, "averaged": True}),
        (folder / "tensor parallel", "tp", {"target": 0.5, "refused": True}),
    ]
    done_cases = launch(2, *cases, run=worker.run)
    assert done_cases.returncode == 0, done_cases.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_choose_and_train_as_one_process(name: str, folder: Path, single: Path) -> None:
    weights, history = read(folder / name)
    others, other_history = read(folder / name, rank=1)
    one, one_history = read(single / name)
    assert history == other_history
    assert len(history) > 4
    assert same_steps(history) == same_steps(one_history)
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key
    assert int(weights["masked"]) > 0  # zeros were looked at after every step
    assert any(weights[key].shape != value.shape for key, value in one.items())  # the sharded one is masked, not sliced
    # Sums over samples are taken in another order.
    torch.testing.assert_close(weights["logits"], one["logits"], rtol=1e-3, atol=1e-4)
    small, expected = (AutoModelForCausalLM.from_pretrained(f / name / "model") for f in (folder, single))
    assert type(small) is type(expected)
    assert same_config(small) == same_config(expected)
    for key, value in expected.named_parameters():
        if key.endswith("c_attn.bias"):  # the keys' gradients are zero but for rounding, and Adam steps by their signs
            continue
        # A solve amplifies what the order of sums rounds, by the condition of its system.
        atol = 1e-4 if CASES[name].get("second_order") else 1e-5
        torch.testing.assert_close(small.get_parameter(key), value, rtol=1e-4, atol=atol, msg=key)


def same_config(model: Any) -> dict[str, Any]:
    fields = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {name: pytest.approx(value) if name.endswith("eps") else value for name, value in fields.items()}


@pytest.mark.parametrize("name", [*CASES, "fsdp2", "fsdp2_full_checkpoint", "full", "bf16-mixed", "nothing left"])
def test_what_is_saved_is_an_ordinary_small_model_with_the_same_logits(name: str, folder: Path) -> None:
    weights, history = read(folder / name)
    for saved in ("model", "plain"):
        model = AutoModelForCausalLM.from_pretrained(folder / name / saved)
        assert sum(p.numel() for p in model.parameters()) == history[-1]["parameters"]
        assert all(bool((p != 0).any()) for p in model.parameters())
        with torch.no_grad():
            torch.testing.assert_close(model(worker.PROBE).logits, weights["logits"], rtol=1e-4, atol=1e-5)
    sizes = CASES.get(name, {}).get("target")
    if isinstance(sizes, dict):
        fields = {"intermediate_size": "n_inner"} if name.startswith("gpt2") else {}
        assert {field: getattr(model.config, fields.get(field, field)) for field in sizes} == sizes


EXPORTED = [("taylor2", 1), ("taylor2", 3), ("full", 0), ("full", 3), ("bf16-mixed", 1)]


@pytest.mark.parametrize(("name", "epoch"), EXPORTED)
def test_a_checkpoint_exports_the_small_model(name: str, epoch: int, folder: Path, tmp_path: Path) -> None:
    found = export(folder / name / f"epoch={epoch}.ckpt", tmp_path / "exported", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    history = [record for record in read(folder / name)[1] if record["step"] <= 4 * (epoch + 1)]
    assert sum(p.numel() for p in model.parameters()) == history[-1]["parameters"]
    assert found.totals(True).numel == history[-1]["parameters"]
    assert found.totals(True).zeros == 0
    if epoch == 3:
        with torch.no_grad():
            expected = read(folder / name)[0]["logits"]
            torch.testing.assert_close(model(worker.PROBE).logits, expected, rtol=1e-4, atol=1e-5)
    export(folder / name / f"epoch={epoch}.ckpt", tmp_path / "half", dtype="bfloat16", progress=False)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="bfloat16")
    for key, value in model.named_parameters():
        assert torch.equal(half.get_parameter(key), value.to(torch.bfloat16)), key


def test_a_full_checkpoint_loads_as_the_masked_model_and_is_saved_small(folder: Path, tmp_path: Path) -> None:
    weights, history = read(folder / "full")
    module = CausalLM.load_from_checkpoint(folder / "full" / "epoch=3.ckpt", weights_only=True)
    torch.testing.assert_close(worker.logits_of(module), weights["logits"], rtol=1e-4, atol=1e-5)
    module.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == history[-1]["parameters"]


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_full_checkpoint"])
def test_resume_is_bit_identical(strategy: str, folder: Path) -> None:
    """Though forward passes between the steps left parameters gathered."""
    for rank in range(2):
        weights, history = read(folder / strategy, rank)
        resumed, resumed_history = read(folder / f"{strategy} rest", rank)
        assert resumed_history == history
        for key in (k for k in weights if k != "masked"):
            assert torch.equal(weights[key], resumed[key]), key
    undisturbed, _ = read(folder / "variant B, kfac")
    for key in (k for k in undisturbed if k != "masked"):
        assert torch.equal(undisturbed[key], read(folder / strategy)[0][key]), key


def test_a_finished_run_has_its_masks_when_nothing_is_left_to_train(folder: Path) -> None:
    weights, history = read(folder / "taylor2")
    resumed, resumed_history = read(folder / "nothing left")
    assert resumed_history == history
    for key in (k for k in weights if k != "masked"):
        assert torch.equal(weights[key], resumed[key]), key


def test_training_on_without_the_callback_keeps_the_zeros(folder: Path) -> None:
    weights, _ = read(folder / "without the callback")
    assert not torch.equal(weights["logits"], read(folder / "taylor2")[0]["logits"])
    model = AutoModelForCausalLM.from_pretrained(folder / "without the callback" / "model")
    assert {field: getattr(model.config, field) for field in ALL} == ALL
    with torch.no_grad():
        torch.testing.assert_close(model(worker.PROBE).logits, weights["logits"], rtol=1e-4, atol=1e-5)


def test_one_process_and_ddp_slice_what_shards_had_masked(folder: Path, single: Path, tmp_path: Path) -> None:
    worker.run(tmp_path, 1, "single", {**LAYERS, "resume": str(folder / "full" / "epoch=1.ckpt"), **AGAIN})
    one, one_history = read(single / "layers, clipping, reached early")
    for weights, history in (read(tmp_path), read(folder / "under DDP", 0), read(folder / "under DDP", 1)):
        assert same_steps(history) == same_steps(one_history)
        for key in (k for k in one if k != "masked"):
            torch.testing.assert_close(weights[key], one[key], rtol=1e-4, atol=1e-5, msg=key)


def test_resume_at_one_rank(folder: Path, tmp_path: Path) -> None:
    resume = {"resume": str(folder / "variant B, kfac" / "epoch=1.ckpt"), **AGAIN}
    done = launch(1, (tmp_path, "fsdp2", {**CASES["variant B, kfac"], **resume}), run=worker.run)
    assert done.returncode == 0, done.stderr[-3000:]
    weights, history = read(tmp_path)
    expected, expected_history = read(folder / "variant B, kfac")
    assert same_steps(history) == same_steps(expected_history)
    for key in (k for k in expected if k != "masked"):
        torch.testing.assert_close(weights[key], expected[key], rtol=5e-3, atol=1e-3, msg=key)


def test_hybrid_shards_choose_and_train_as_one_process(single: Path, tmp_path: Path) -> None:
    names = ("taylor2", "variant B, kfac")
    done = launch(4, *((tmp_path / name, "hsdp", CASES[name]) for name in names), run=worker.run)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        one, one_history = read(single / name)
        for rank in range(4):
            weights, history = read(tmp_path / name, rank)
            assert same_steps(history) == same_steps(one_history)
            torch.testing.assert_close(weights["logits"], one["logits"], rtol=1e-3, atol=1e-4)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        for key, value in AutoModelForCausalLM.from_pretrained(single / name / "model").named_parameters():
            torch.testing.assert_close(model.get_parameter(key), value, rtol=1e-4, atol=1e-5, msg=key)


def test_what_is_refused(folder: Path) -> None:
    for rank in range(2):
        assert "written on one device or under DDP" in (folder / "foreign" / f"rank{rank}.txt").read_text()
        assert "'intermediate_size': 63" in (folder / "other sizes" / f"rank{rank}.txt").read_text()
        assert "WeightAveraging keeps a copy" in (folder / "averaged" / f"rank{rank}.txt").read_text()
        assert "tensor_parallel_size=2" in (folder / "tensor parallel" / f"rank{rank}.txt").read_text()
