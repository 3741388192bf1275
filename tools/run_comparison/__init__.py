"""What tools/compare_runs.py is made of."""
