"""The parts of tools/benchmark_kk.py."""
