"""Cases of make_reference_vectors.py: random batches, and what TRL and verl compute on them."""
