"""Modules of bench_moe: a planted mixture of experts, decoded by weightd and by llama.cpp."""
