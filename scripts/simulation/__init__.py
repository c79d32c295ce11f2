"""Replacement policies of the pool, tried on traces (simulate_pool.py)."""
