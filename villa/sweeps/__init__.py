"""Sweeps: many runs of one recipe, with a table and a figure of their results."""
