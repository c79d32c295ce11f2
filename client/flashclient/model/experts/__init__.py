"""Models with experts: what their routers will pick is guessed."""
