"""What benchmark_convergence.py is made of: which runs, running them, what they came to, the figure and the page."""
