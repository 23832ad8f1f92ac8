"""LoRA: the layer (linear), where it goes (inject), its weights as one vector (adapters) and as one file (files)."""
