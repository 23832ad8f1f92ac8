"""The toy world, the default that trains offline: its pictures, its small SDXL, how both were made, its scores."""
