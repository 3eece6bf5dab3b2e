"""Known-good experiments as YAML; the first lines of each are its command, expected time and number."""
