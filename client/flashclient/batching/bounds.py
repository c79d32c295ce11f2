"""Bounds of what runs and waits at once. They are here so that commands know them without loading torch."""

SEQUENCES_MAX = 16  # rows that a kernel computes at once
WAITING_MAX = 64
CACHE_TOKENS_MAX = 1 << 15  # of keys and values: 6.4 GB for a model of Llama 1.3B's shape in 16 bit
KEPT_TOKENS_MAX = CACHE_TOKENS_MAX // 2
