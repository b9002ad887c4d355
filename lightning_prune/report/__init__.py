"""`report`: one HTML file about a pruned model or a run, that needs nothing but a browser."""

from lightning_prune.report.page import report

__all__ = ["report"]
