"""UNITER and its heads."""
