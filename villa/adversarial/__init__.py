"""Adversarial perturbations in embedding space: how they start, move, are bounded, and enter a model."""
