"""Checkpoints to import: Hugging Face folders and GGUF files, read as tensors and configuration."""
