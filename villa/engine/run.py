"""A recipe to what it asks for."""

from __future__ import annotations

from villa.config.schema import RunConfig


def run(config: RunConfig) -> int:
    """Do what ``config.run_type`` says; return the process's exit code.

    Raises:
        VillaError: the recipe, data or checkpoints cannot be used.
    """
    if config.run_type in ("train", "train_val_test"):
        from villa.engine.train import train

        return train(config)
    from villa.engine import inference

    return inference.predict(config) if config.run_type == "predict" else inference.evaluate(config)
