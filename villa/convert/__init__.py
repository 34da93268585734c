"""Converters of annotations, features, checkpoints and configurations."""
