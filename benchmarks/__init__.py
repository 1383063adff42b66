"""Benchmarks of Attune: one `bench_*.py` per claim, run as `python -m benchmarks.bench_…`."""
