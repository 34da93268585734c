"""Sweeps: many runs of one recipe, and the table and figure of what they reach."""
