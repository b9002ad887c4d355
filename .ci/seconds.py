"""Print how long this Python takes for a loop, unless it is too old or cannot make environments.

How an interpreter was built makes a difference of a quarter to the tests.
"""

import ensurepip  # noqa: F401  # some distributions leave it out
import os
import sys
import sysconfig
import time

if sys.version_info < (3, 10) or not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit(1)  # a test compiles against the headers


def loop() -> float:
    """Count something."""
    start, counts = time.process_time(), {}
    for number in range(500_000):
        counts[number % 1000] = len(str(number)) + counts.get(number % 7, 0)
    return time.process_time() - start


print(f"{min(loop() for _ in range(5)):.4f}")
