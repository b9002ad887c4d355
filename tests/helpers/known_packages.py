"""Keep what installed packages offer as plugins: every Trainer reads the files of all of them to ask for callbacks.

To be imported before lightning, which takes the function by its name.
"""

from __future__ import annotations

import functools
import importlib.metadata

importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
