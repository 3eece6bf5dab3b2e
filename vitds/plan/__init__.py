"""Memory, traffic and hours by arithmetic alone."""
