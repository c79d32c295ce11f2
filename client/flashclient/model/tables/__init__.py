"""Weights that are no tensors of values: tables, whose rows are read when they are looked up; matrices in blocks."""
