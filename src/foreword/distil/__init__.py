"""Compression: a long context becomes a prompt or a prefix, by distillation."""
