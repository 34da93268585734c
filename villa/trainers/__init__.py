"""Adversarial methods."""
