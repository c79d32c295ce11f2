"""Checkpoints that are published quantised: which tensors hold numbers, and which their scales."""
