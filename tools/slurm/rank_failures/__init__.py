"""Parts of tools/slurm/first_failure.py: what failed, by records and logs, and what of it is the cause."""
