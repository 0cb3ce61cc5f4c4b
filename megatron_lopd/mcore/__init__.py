"""Everything that touches Megatron-Core."""
