"""transformers' model around streamed FFNs: their installation, predictors, windows."""
