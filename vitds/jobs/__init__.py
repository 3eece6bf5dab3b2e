"""Composition roots, a module a command; open jobs/pretrain.py first."""
