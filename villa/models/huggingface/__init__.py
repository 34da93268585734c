"""Models of the transformers library through one adapter."""
