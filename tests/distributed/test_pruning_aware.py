"""A model that shrinks under DDP, with real processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shrinking_worker
import torch
from launching import launch_calls
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

SETTINGS: dict[str, Any] = {"target": 0.6, "end": 13, "compact_every": 3}
CASES: dict[str, dict[str, Any]] = {
    "variant A": SETTINGS,
    "variant B, accumulation, bucket views, unused": {
        **SETTINGS, "second_order": True, "second_order_every": 2, "end": 6, "trainer": {"accumulate_grad_batches": 2},
        "ddp": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
    },
    "then 2:4, then adapters": {
        **SETTINGS, "types": ["ffn", "hidden"], "end": 5, "round_to": 4, "masks_at": 7,
    },
    "2:4 from the start, then adapters": {
        **SETTINGS, "end": 8, "round_to": 4, "masks_at": 0, "trainer": {"accumulate_grad_batches": 2}, "epochs": 6,
    },
    "experts and heads": {
        "target": {"num_experts": 3, "num_key_value_heads": 1}, "types": ["attention", "expert"], "every_n_steps": 2,
    },
    "layers, static graph, clipping": {
        **SETTINGS, "types": ["ffn", "layer"], "ddp": {"static_graph": True}, "trainer": {"gradient_clip_val": 0.5},
    },
}  # fmt: skip


def launch(devices: int, *cases: tuple[Path, dict[str, Any]]) -> None:
    for folder, _ in cases:
        folder.mkdir(parents=True, exist_ok=True)
    done = launch_calls(devices, shrinking_worker.run, [(folder, devices, settings) for folder, settings in cases])
    assert done.returncode == 0, done.stderr[-3000:]


def read(folder: Path, rank: int = 0) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return load_file(folder / f"rank{rank}.safetensors"), json.loads((folder / f"rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in the same two processes, and a resume of the first."""
    folder = tmp_path_factory.mktemp("two")
    cases = [(folder / name, settings) for name, settings in CASES.items()]
    resume = {**SETTINGS, "resume": str(folder / "variant A" / "epoch=1.ckpt")}
    launch(2, *cases, (folder / "resumed", resume))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_with_each_other_and_with_one_process(name: str, two_ranks: Path, tmp_path: Path) -> None:
    weights, history = read(two_ranks / name)
    others, other_history = read(two_ranks / name, rank=1)
    assert history == other_history
    assert len(history) > 4 or "masks_at" in CASES[name]
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key

    settings = {k: v for k, v in CASES[name].items() if k != "ddp"}
    shrinking_worker.run(tmp_path, 1, settings)
    single, single_history = read(tmp_path)
    assert [(r["step"], r["tokens"], r["units"]) for r in history] == [
        (r["step"], r["tokens"], r["units"]) for r in single_history
    ]
    for key, value in single.items():  # sums over samples are taken in another order
        torch.testing.assert_close(weights[key], value, rtol=5e-3, atol=1e-3, msg=key)
        if "masks_at" in CASES[name]:
            assert torch.equal(weights[key] == 0, value == 0), key
            kept = (value != 0).view(len(value), -1, 4).sum(-1) if "layers." in key and value.dim() == 2 else None
            assert kept is None or bool((kept == 2).all()), key


def test_resume_is_bit_identical(two_ranks: Path) -> None:
    weights, history = read(two_ranks / "variant A")
    resumed, resumed_history = read(two_ranks / "resumed")
    assert resumed_history == history
    for key, value in weights.items():
        assert torch.equal(value, resumed[key]), key


def test_resume_at_another_number_of_processes(two_ranks: Path, tmp_path: Path) -> None:
    shrinking_worker.run(tmp_path, 1, {**SETTINGS, "resume": str(two_ranks / "variant A" / "epoch=1.ckpt")})
    weights, history = read(two_ranks / "variant A")
    resumed, resumed_history = read(tmp_path)
    assert [r["units"] for r in resumed_history] == [r["units"] for r in history]
    for key, value in weights.items():
        torch.testing.assert_close(resumed[key], value, rtol=5e-3, atol=1e-3, msg=key)
