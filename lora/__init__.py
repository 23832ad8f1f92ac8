"""LoRA in three files: the layer (linear), where it goes (inject), how it is stored (files). The rest is for speed."""
