"""The parts of tools/combine_datasets.py: read inputs, decide which rows to take, write them."""
