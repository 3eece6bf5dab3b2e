"""Pixels on the host: plans and bytes in, pixels out; no settings, no torch."""
