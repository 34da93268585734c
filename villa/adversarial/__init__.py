"""Adversarial perturbations in embedding space: initialisation, ascent, projection and injection."""
