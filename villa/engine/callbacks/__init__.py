"""What happens around updates: logging, evaluation, checkpoints, signals."""
