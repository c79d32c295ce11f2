"""Parts of soak.py: clients, daemons, the store, hostile clients."""
