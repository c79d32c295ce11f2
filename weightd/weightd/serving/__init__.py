"""The serving process: configuration, models in use, the calls of the control plane."""
