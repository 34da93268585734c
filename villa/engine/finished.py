"""A note in a run's folder that says that the run is done, and by which recipe."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from villa.config.printer import to_yaml
from villa.config.schema import RunConfig
from villa.files import read_json, write_json
from villa.launch.base import LauncherConfig

FINISHED = "finished.json"


def saved_yaml(config: RunConfig) -> str:
    """The recipe as it is saved: the same whether the run was resumed or not, and wherever it takes place."""
    checkpoint = dataclasses.replace(config.checkpoint, resume=False)
    return to_yaml(dataclasses.replace(config, checkpoint=checkpoint, launcher=LauncherConfig()))


def mark_finished(config: RunConfig) -> None:
    """Say that the run is done."""
    write_json(Path(config.output_dir) / FINISHED, {"recipe": _recipe(config)})


def is_finished(config: RunConfig) -> bool:
    """Whether the run's folder says that it was done, by the recipe as it is now.

    Raises:
        DataError: the note is damaged.
    """
    path = Path(config.output_dir) / FINISHED
    if not path.is_file():
        return False
    return bool(read_json(path, "note of a finished run", "remove it") == {"recipe": _recipe(config)})


def _recipe(config: RunConfig) -> str:
    return hashlib.sha256(saved_yaml(config).encode()).hexdigest()
