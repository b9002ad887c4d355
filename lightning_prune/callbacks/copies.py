"""What copies of callbacks (``copy.deepcopy``, pickle) take along."""

from __future__ import annotations

from typing import Any

import lightning as L

# Methods of the module that the Trainer gives every callback; with them the module and the Trainer would be copied.
_OF_THE_MODULE = ("log", "log_dict")


def copied_state(callback: L.Callback, **instead: Any) -> dict[str, Any]:
    """A callback's attributes without those of its Trainer, for ``__getstate__``.

    Args:
        callback: The callback.
        **instead: Values in place of what belongs to a module, an optimizer or a fit that runs.
    """
    return {name: value for name, value in vars(callback).items() if name not in _OF_THE_MODULE} | instead
