"""Modules of bench_memory_speed: models, the processes that take turns, and rows."""
