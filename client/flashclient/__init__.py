"""The inference library: predictor, window and forward pass on the pool of a weightd. See ARCHITECTURE.md."""
