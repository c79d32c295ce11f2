"""Where clients connect: sockets, TLS, identities, access rules and bounds per user."""
