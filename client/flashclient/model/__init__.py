"""transformers' model around streamed FFNs: predictors, windows, kernels as torch modules."""
