"""Parts of tools/slurm/preflight.py: what a node finds out about itself, how nodes tell each other, who is at fault."""
