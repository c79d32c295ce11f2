"""An import: the tensors of a checkpoint become the bundles and resident weights of a stored model."""
