"""Where the tensors of a model of transformers lie in a checkpoint."""
