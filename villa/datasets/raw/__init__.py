"""Readers of the annotation files that data sets are released as, and their conversion to the official databases."""
