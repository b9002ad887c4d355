"""The benchmarks are scripts: keep pytest (and its doctest collection) from importing them."""

collect_ignore_glob = ["*.py"]
