"""Frozen models: where their files are, and the kernels that make them fast."""
