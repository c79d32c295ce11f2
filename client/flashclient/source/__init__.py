"""The sources of a model's bytes: shared memory on this machine, gRPC from another."""
