"""Data sets, their stores, and the way from examples to batches and updates."""
