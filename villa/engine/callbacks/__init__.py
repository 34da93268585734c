"""Callbacks around updates: logging, evaluation, checkpoints and signals."""
