"""Commands: they wire the parts together and compute nothing."""
