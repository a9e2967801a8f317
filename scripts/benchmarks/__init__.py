"""What `scripts/benchmark.py` measures: a file a subject, each with `add_arguments` and `run`."""
