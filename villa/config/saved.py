"""The recipe that was saved with a trained model, for commands that name a model but no recipe."""

from __future__ import annotations

from villa.config.values import Layer, Origin, Value
from villa.errors import ConfigError

#: Run types that only read a trained model.
READING = ("val", "test", "predict")

_NOTHING = Value(None, Origin("default"))


def saved_recipe(overrides: Layer) -> list[Layer]:
    """Return the layers of the recipe of ``checkpoint.path``; where only results are written, with a folder for them.

    Args:
        overrides: the command line's values.

    Returns:
        Nothing when the command line names no trained model.

    Raises:
        CheckpointError: the trained model does not exist or is damaged.
        ConfigError: it is to be trained on, and no new ``output_dir`` is given; or the recipe is no saved one (see
            ``read_stored``).
    """
    from villa.hub.opening import open_source

    path, run_type, output = (overrides.get(key, _NOTHING) for key in ("checkpoint.path", "run_type", "output_dir"))
    if not path.data or not path.text:
        return []
    reads = run_type.text in READING
    if not reads and output.data is None:
        raise ConfigError(
            f"checkpoint.path='{path.text}' is to be trained on: give output_dir=..., where the new run goes"
        )
    source = open_source(path.text)
    layers = [_usable(layer) for layer in source.recipe()]
    if not reads:
        return layers
    results = str(source.results(str(run_type.text)))
    return [*layers, {"output_dir": Value(results, Origin("for the results"), results)}]


def _usable(layer: Layer) -> Layer:
    """Leave out where the model was trained and what was written, which a folder from elsewhere must not choose."""
    return {key: value for key, value in layer.items() if not key.startswith(("launcher", "predict.output"))}
