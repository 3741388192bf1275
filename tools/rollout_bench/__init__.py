"""Parts of tools/benchmark_rollout.py."""
