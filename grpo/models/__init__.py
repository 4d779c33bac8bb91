"""Models: loading, the tiny base model, LoRA, saving, optimizer, device."""
