"""Tests that need a CUDA GPU; elsewhere they are skipped at once.

    python -m pytest tests/gpu -n 0

takes under three minutes on one GPU. ``GPU_TESTS_ON=cpu`` runs all but those that only CUDA can on the CPU, to try the
tests themselves; ``GPU_TESTS_ON=pretend`` on a device that the CPU computes for, but whose tensors do not mix with the
CPU's (pretend_device.py in the helpers).
"""

from __future__ import annotations

import os
from pathlib import Path

import pretend_device
import pytest
import torch

ACCELERATOR = os.environ.get("GPU_TESTS_ON", "cuda")
if ACCELERATOR == "pretend":
    pretend_device.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents or item.path.name == "test_pretend.py":
            continue
        if ACCELERATOR == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU (GPU_TESTS_ON=cpu tries the tests on the CPU)"))
        elif ACCELERATOR != "cuda" and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="only CUDA can do this"))
