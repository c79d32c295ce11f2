"""torch modules and tensors on the native kernels: linear layers, attention, dtypes, and memory for one call."""
