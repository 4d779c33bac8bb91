"""Optimized code that gives the same results: KV cache, sampling noise, LM head, row layout, model capabilities."""
