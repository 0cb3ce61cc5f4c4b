"""Hugging Face <-> Megatron weights, one declarative mapping per architecture."""
