"""A device that stands in for a GPU: computed by the CPU, but tensors of two devices do not mix.

It finds what a test on the CPU cannot: a mask, a statistic or an index that stayed behind in main memory. What takes
time, needs memory or depends on kernels of CUDA it does not show.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import library as operators
from torch.utils.cpp_extension import load

NAME = "pretend"
DEVICE = torch.device("cpu")


class _Module(ModuleType):
    """What torch looks for as `torch.pretend`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        torch.ops.pretend.seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return torch.ops.pretend.state()

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        torch.ops.pretend.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def empty_cache(self) -> None:
        pass


# What autocast narrows on CUDA, and what it widens, as far as the models of the tests have it.
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d", "_convolution")
_NARROWED = (*_PRODUCTS, "scaled_dot_product_attention")
_LOSSES = ("nll_loss", "cross_entropy_loss", "mse_loss")
_WIDENED = (*_LOSSES, "layer_norm", "rsqrt", "pow.Tensor_Scalar", "softmax.int", "log_softmax.int")


def _autocast(library: operators.Library, name: str, narrow: bool) -> None:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == NAME:
            return value.to(torch.get_autocast_dtype(NAME) if narrow else torch.float32)
        return value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*map(cast, args), **kwargs)

    library.impl(op, run, "AutocastPrivateUse1")


_library: list[operators.Library] = []


def start(folder: str | None = None) -> torch.device:
    """Compile and register the device; once a process."""
    global DEVICE
    if DEVICE.type == NAME:
        return DEVICE
    folder = folder or os.path.join(tempfile.gettempdir(), f"pretend_device_{torch.__version__}")
    os.makedirs(folder, exist_ok=True)
    source = Path(__file__).with_suffix(".cpp")
    torch.utils.rename_privateuse1_backend(NAME)
    with FileLock(os.path.join(folder, "own.lock")):
        # torch's own lock is a file that stays when its process is killed, and everybody after it would wait for ever.
        Path(folder, "lock").unlink(missing_ok=True)
        load("pretend_device", [str(source)], build_directory=folder, extra_cflags=["-O0"], is_python_module=False)
    torch._register_device_module(NAME, _Module(NAME))
    torch.utils.generate_methods_for_privateuse1_backend()
    library = operators.Library("aten", "IMPL")
    _library.append(library)  # it registers as long as it lives
    for names, narrow in ((_NARROWED, True), (_WIDENED, False)):
        for name in names:
            _autocast(library, name, narrow)
    DEVICE = torch.device(NAME, 0)
    return DEVICE


class PretendAccelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def placed(precision: Any = None, **options: Any) -> dict[str, Any]:
    """Return the arguments of a Trainer that runs on the device."""
    strategy = SingleDeviceStrategy(torch.device(NAME, 0), accelerator=PretendAccelerator())
    if precision in ("bf16-mixed", "16-mixed"):  # Lightning itself knows autocast of CUDA and of the CPU
        options["plugins"] = [MixedPrecision(precision, NAME)]
    elif precision is not None:
        options["precision"] = precision
    return {"strategy": strategy, "devices": 1, **options}
