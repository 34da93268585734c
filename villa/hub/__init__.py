"""Trained models: open runs, checkpoints, saved folders and folders of transformers, and check them."""
