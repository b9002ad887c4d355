"""Build transformers' table of renamed weights: the first model that a process saves or loads asks for all of it."""

from __future__ import annotations

try:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
except ImportError:  # transformers 4 has none
    pass
else:
    get_checkpoint_conversion_mapping("llama")
