"""Open, inspect, load and export checkpoints without running what is in them."""
