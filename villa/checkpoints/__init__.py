"""Checkpoints on disk: writing, finding, reading."""
