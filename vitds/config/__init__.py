"""Typed, validated, frozen settings; recipes and flags; the user's DeepSpeed JSON. Imports no torch."""
