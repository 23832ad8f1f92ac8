"""The toy world: what the default run trains on, offline. Its pictures, its small SDXL, how both were made, its scores."""
