"""An adapter for models of the transformers library."""
