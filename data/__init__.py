"""Pixels and captions -> one memory-mapped cache that training reads."""
