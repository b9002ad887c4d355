"""A part of the tests on one GPU, on a device whose tensors do not mix with the CPU's; in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

# One of each callback and function; `GPU_TESTS_ON=pretend` runs the rest too.
CHOSEN = (
    "test_scores and kfac and bf16-mixed or test_adapters and scale_lora or test_reconstruction and all or "
    "test_shrinking and kfac-True or test_distillation or test_prune_structured or test_channels or test_a_checkpoint "
    "or test_evaluate or test_resume or test_default_device"
)


@pytest.mark.slow
@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="the device is written for torch 2.13")
@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="needs a compiler and ninja")
@pytest.mark.skipif("GPU_TESTS_ON" in os.environ, reason="starts the tests itself")
def test_tensors_of_the_device_and_of_the_cpu_never_meet() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-k", CHOSEN, Path(__file__).with_name("test_gpu.py")],
        env=os.environ | {"GPU_TESTS_ON": "pretend"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-3000:]
    assert int(passed[1]) >= 10
