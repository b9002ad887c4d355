"""The two forms of a held mask clear the same bits; the Triton kernel is run by its interpreter, where Triton is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading

import clearing_cases
import pytest
import torch

from lightning_prune.pruning import clearing
from lightning_prune.pruning.clearing import BitMask, ByteMask, held

CPU = torch.device("cpu")


def test_bytes():
    clearing_cases.compare(ByteMask, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_bits_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, clearing_cases.__file__, "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_memory_to_work_in_outlives_inference_mode(monkeypatch):
    monkeypatch.setattr(clearing, "_kept", threading.local())
    mask = ByteMask(torch.tensor([True, False]), CPU)
    for mode in (torch.inference_mode(), torch.no_grad()):
        tensor = torch.ones(2)
        with mode:
            mask.clear(tensor)
        assert tensor.tolist() == [1.0, 0.0]


def test_a_cpu_holds_bytes():
    assert isinstance(held(torch.ones(3, dtype=torch.bool), CPU), ByteMask)


def test_bits_take_an_eighth_and_what_the_kernel_does_not_reach_is_done_without_it(monkeypatch):
    mask = torch.rand(12, 16) < 0.5
    bits = BitMask(mask, CPU)
    assert bits._bits.nbytes == mask.numel() // 8
    monkeypatch.setattr(clearing, "_launch", None)
    values = torch.full((16, 12), -2.0).t()
    bits.clear(values)
    assert torch.equal(values, torch.where(mask, -2.0, 0.0))
    with pytest.raises(RuntimeError, match=r"cannot mask a torch\.sparse_coo tensor"):
        bits.clear(torch.eye(12, 16).to_sparse())


@pytest.mark.parametrize("failure", ["no triton", "no compiler", "wrong"])
def test_a_kernel_that_does_not_run_leaves_bytes(monkeypatch, failure, recwarn):
    def launch(*_):
        if failure == "no triton":
            raise ModuleNotFoundError("No module named 'triton'")
        if failure == "no compiler":
            raise RuntimeError("Failed to find C compiler")

    clearing.kernel_runs.cache_clear()
    monkeypatch.setattr(clearing, "_launch", launch)
    try:
        assert not clearing.kernel_runs(CPU)
        said = [str(w.message) for w in recwarn if "held as bytes" in str(w.message)]
        assert len(said) == (failure != "no triton")
    finally:
        clearing.kernel_runs.cache_clear()
