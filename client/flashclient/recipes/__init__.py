"""Recipes: how an import makes a model of transformers from a checkpoint, derived from the model and proven."""
