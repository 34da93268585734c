"""Commands, which wire the parts together and compute nothing."""
