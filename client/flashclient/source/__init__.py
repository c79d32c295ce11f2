"""Where a model's bytes come from: shared memory on this machine, gRPC from elsewhere."""
