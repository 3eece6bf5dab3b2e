"""vitds bench: measurements of the parts, side by side with what they replace."""
