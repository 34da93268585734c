"""Trained models as folders in the conventions of the hub of models: written, read, and those of transformers read."""
