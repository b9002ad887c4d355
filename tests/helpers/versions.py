"""What some versions of the libraries lack: tests of it are skipped there by that reason."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version


def has(package: str, least: str) -> bool:
    """Whether a package is installed in a version or a later one."""
    return Version(version(package)) >= Version(least)


def needs(package: str, least: str, why: str) -> pytest.MarkDecorator:
    """Skip a test where an older version is installed."""
    return pytest.mark.skipif(not has(package, least), reason=f"{why}: needs {package} {least}")


# FSDP2 on CPUs, which the tests of sharding run on.
SHARDING = needs("torch", "2.7", "FSDP2 on a CPU")
# What a Trainer is told to read a checkpoint with; before lightning 2.6 it could not be told.
WEIGHTS_ONLY: dict[str, Any] = {"weights_only": True} if has("lightning", "2.6") else {}
