"""The same numbers with less work: KV cache, sampling noise, LM head, row layout, what a model can do."""
