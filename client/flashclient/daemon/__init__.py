"""The weightd of a client: its address, the gRPC channel, and a private daemon where none runs."""
