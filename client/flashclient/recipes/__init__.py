"""Recipes: how an import makes a model from a checkpoint, derived from transformers' own classes and proven."""
