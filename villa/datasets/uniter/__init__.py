"""UNITER's databases and their tasks."""
