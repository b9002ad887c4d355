"""Callbacks, of Lightning and of transformers: hooks only; the algorithms are the functions of the package."""
