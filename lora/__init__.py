"""LoRA in three files: the layer (linear), where it goes (inject), how it is stored (files); the others make it fast."""
