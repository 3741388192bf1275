"""The parts of tools/benchmark_curriculum.py."""
