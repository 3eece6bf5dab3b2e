"""Memory, traffic and hours of a run by arithmetic, before anything runs.

docs/plan.md has the formulas and what they were checked on.
"""
