"""The recipe that was saved with a checkpoint, for commands that name a checkpoint but no recipe."""

from __future__ import annotations

from pathlib import Path

from villa.config.reader import read_layers
from villa.config.values import Layer, Origin, Value

#: Run types that only read a checkpoint.
READING = ("val", "test", "predict")


def saved_recipe(overrides: Layer) -> list[Layer]:
    """Return the layers of the recipe of ``checkpoint.path``, with an unused ``output_dir`` beside the run's files.

    Args:
        overrides: the command line's values.

    Returns:
        Nothing when the command line names no checkpoint, or asks for training.

    Raises:
        CheckpointError: the checkpoint does not exist or is damaged.
    """
    from villa.engine.checkpoint import FOLDER, resolve
    from villa.engine.folder import CONFIG, unused
    from villa.files import local_path

    path, run_type = (overrides[key].text if key in overrides else None for key in ("checkpoint.path", "run_type"))
    if not path or run_type not in READING:
        return []
    checkpoint = resolve(local_path(path))
    run = checkpoint.parents[1] if checkpoint.parent.name == FOLDER else checkpoint.parent
    output = str(unused(run / Path(run_type)))
    return [*read_layers(str(checkpoint / CONFIG)), {"output_dir": Value(output, Origin("beside the run"), output)}]
