"""The recipe that was saved with a checkpoint, for commands that name a checkpoint but no recipe."""

from __future__ import annotations

from pathlib import Path

from villa.config.reader import read_layers
from villa.config.values import Layer, Origin, Value
from villa.errors import ConfigError

#: Run types that only read a checkpoint.
READING = ("val", "test", "predict")

_NOTHING = Value(None, Origin("default"))


def saved_recipe(overrides: Layer) -> list[Layer]:
    """Return the layers of the recipe of ``checkpoint.path``, with an unused ``output_dir`` beside the run's files.

    Args:
        overrides: the command line's values.

    Returns:
        Nothing when the command line names no checkpoint, or asks for training.

    Raises:
        CheckpointError: the checkpoint does not exist or is damaged.
        ConfigError: the recipe names a ``user_dir`` and the command line does not: a folder from elsewhere must not
            choose code to run.
    """
    from villa.engine.checkpoint import FOLDER, resolve
    from villa.engine.folder import CONFIG, unused
    from villa.files import local_path

    path, run_type = (overrides.get(key, _NOTHING) for key in ("checkpoint.path", "run_type"))
    if not path.data or not path.text or run_type.text not in READING:
        return []
    checkpoint = resolve(local_path(path.text))
    run = checkpoint.parents[1] if checkpoint.parent.name == FOLDER else checkpoint.parent
    output = str(unused(run / Path(run_type.text)))
    layers = read_layers(str(checkpoint / CONFIG))
    code = next((layer["user_dir"].text for layer in layers if layer.get("user_dir", _NOTHING).data), None)
    if code is not None and "user_dir" not in overrides:
        raise ConfigError(
            f"checkpoint '{path.text}' needs the code of user_dir '{code}', which is not imported just because a "
            f"checkpoint says so; if you trust it, add user_dir={code}"
        )
    return [*layers, {"output_dir": Value(output, Origin("beside the run"), output)}]
