"""Measure a model: perplexity, tasks, latency."""
