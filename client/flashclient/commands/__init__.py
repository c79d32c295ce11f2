"""The commands of `flashclient`, one module each. They import torch and transformers only when they run."""
