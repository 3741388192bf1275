"""Parts of tools/benchmark_actor.py."""
