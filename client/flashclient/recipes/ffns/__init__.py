"""A model's FFNs, found by running a tiny instance of it and carried over to its full size."""
