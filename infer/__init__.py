"""Base against LoRA: the same prompts from the same noise."""
