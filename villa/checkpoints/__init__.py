"""Checkpoints and files of weights: write, find, verify and read them."""
