"""Kill a process ahead of each thing that it does with files."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.", "ctypes.")
"""What Python announces ahead of each operation on files."""


def killed_at_every_operation(action: Callable[[], Any], check: Callable[[], None]) -> int:
    """Run `action` in children, each killed ahead of one more file operation; returns how many were killed."""
    for operation in range(400):
        child = os.fork()
        if child == 0:
            left = operation

            def hook(event: str, arguments: Any) -> None:
                nonlocal left
                if event.startswith(FILE_EVENTS) and event != "os.kill":
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            try:
                action()
            except BaseException:  # nothing of pytest may run in the child
                os._exit(7)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        check()
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return operation
    raise AssertionError("the action never ends")
