"""Backbones: timm's, asked what they are, built whole from the seed, their drop path and patch drop keyed."""
