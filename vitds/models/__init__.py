"""Backbones: timm's, and those that timm lacks, registered with timm."""
