"""The rows of the paper's tables, as bench_paper.py runs them."""
