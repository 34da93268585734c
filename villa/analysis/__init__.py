"""What trained models do under attack."""
