"""Knights and Knaves: puzzles, their text, and data sets of them. Imports nothing of `megatron_dump`."""
