"""Image files -> .beton -> batches of uint8 crops and instance index."""
