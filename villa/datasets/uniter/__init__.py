"""UNITER's databases and the tasks on them."""
