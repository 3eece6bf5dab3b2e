"""Composition roots, a module a command; open jobs/train.py first."""
