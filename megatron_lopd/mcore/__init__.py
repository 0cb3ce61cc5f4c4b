"""Megatron-Core: the model, its layouts, optimizer and precision, and all that it takes to rely on it."""
