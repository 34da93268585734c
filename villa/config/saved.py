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
        ConfigError: the recipe names a ``user_dir`` and the command line does not: a folder from elsewhere must not
            choose code to run. Or it is to be trained on, and no new ``output_dir`` is given.
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
    layers = source.recipe()
    code = next((layer["user_dir"].text for layer in layers if layer.get("user_dir", _NOTHING).data), None)
    if code is not None and "user_dir" not in overrides:
        raise ConfigError(
            f"checkpoint '{path.text}' needs the code of user_dir '{code}', which is not imported just because a "
            f"checkpoint says so; if you trust it, add user_dir={code}"
        )
    if not reads:
        return layers
    results = str(source.results(str(run_type.text)))
    return [*layers, {"output_dir": Value(results, Origin("for the results"), results)}]
