"""Parts of tools/benchmark_multinode.py."""
