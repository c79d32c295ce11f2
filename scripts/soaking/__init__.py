"""The parts of soak.py: clients, daemons, the store, hostile ones."""
