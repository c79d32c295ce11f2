"""Measures a model's sparsity and quality, trains its predictors and publishes both."""
