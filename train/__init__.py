"""From the cache to LoRA weights. Read diffusion.py, then loop.py."""
