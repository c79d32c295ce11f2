"""What an import would make of a model, and what it would cost to run, before anything is written."""
