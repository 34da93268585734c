"""A recipe with stages: one training run after another, each in its own folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from villa.config.schema import RunConfig
from villa.datasets.base import TaskDataset
from villa.engine.folder import refuse_used
from villa.engine.train import saved_yaml, train
from villa.errors import VillaError
from villa.files import read_json, write_json
from villa.registry import DATASETS

#: Says in a stage's folder that it is done, and by which recipe.
FINISHED = "stage.json"


def run_stages(configs: Sequence[RunConfig]) -> int:
    """Train stage after stage; with ``checkpoint.resume``, finished ones are passed over.

    Returns:
        0, or the exit code of the stage that was interrupted.

    Raises:
        VillaError: a stage's recipe, data, folder or checkpoints cannot be used; its number is named. Folders and data
            of all stages are looked at before the first one trains.
    """
    for number, config in enumerate(configs, start=1):
        with _named(number):
            refuse_used(Path(config.output_dir), resume=config.checkpoint.resume)
    waiting = [number for number, config in enumerate(configs, start=1) if not _finished(config)]
    for number in waiting[1:]:
        with _named(number):
            _open_data(configs[number - 1])
    for number, config in enumerate(configs, start=1):
        state = "" if number in waiting else "finished, "
        print(f"stage {number} of {len(configs)} ({config.name}): {state}{config.output_dir}", flush=True)
        if number not in waiting:
            continue
        with _named(number):
            code = train(config)
        if code:
            return code
        write_json(Path(config.output_dir) / FINISHED, {"recipe": _recipe(config)})
    return 0


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Say which stage an error is about."""
    try:
        yield
    except VillaError as error:
        raise type(error)(f"stage {number}: {error}") from error


def _finished(config: RunConfig) -> bool:
    """Whether a stage is to be passed over: it was done by the recipe as it is now."""
    path = Path(config.output_dir) / FINISHED
    if not config.checkpoint.resume or not path.is_file():
        return False
    return bool(read_json(path, "note of a finished stage", "remove it") == {"recipe": _recipe(config)})


def _recipe(config: RunConfig) -> str:
    return hashlib.sha256(saved_yaml(config).encode()).hexdigest()


def _open_data(config: RunConfig) -> None:
    """Find out now that a later stage's data are not there."""
    data: TaskDataset = DATASETS.get(config.dataset.name)(config.dataset)
    data.split("train")
