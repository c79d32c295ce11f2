"""The demo's parts, and the training of the models that ship."""
