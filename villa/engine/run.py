"""Dispatch of a recipe by run type."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from villa.config.schema import RunConfig
from villa.config.validate import TRAINING_RUNS
from villa.datasets.base import TaskDataset
from villa.engine.run_folder import is_finished, refuse_used
from villa.errors import about
from villa.registry import DATASETS

if TYPE_CHECKING:
    from villa.engine.loop import Callback

#: glibc's options of ``mallopt``, and thresholds in bytes: the second one is the largest that old versions take.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_THRESHOLDS = (1 << 30, 1 << 25)


def keep_freed_memory() -> bool:
    """Make malloc keep memory that is freed: else each update gets its large tensors as new pages of zeros.

    Nothing happens with another C library than glibc, or with ``VILLA_MALLOC=off``.

    Returns:
        Whether malloc was told to.
    """
    if os.environ.get("VILLA_MALLOC") == "off":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mapped = any(mallopt(_MMAP_THRESHOLD, threshold) for threshold in _THRESHOLDS)
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and mapped


def run(config: RunConfig, callbacks: Sequence[Callback] = ()) -> int:
    """Run ``config.run_type``; return the process's exit code.

    Args:
        config: the recipe.
        callbacks: callbacks of a training run, besides those that the recipe names.

    Raises:
        VillaError: the recipe, data or checkpoints cannot be used.
    """
    if config.run_type in TRAINING_RUNS:
        from villa.engine.train import train

        keep_freed_memory()
        return train(config, callbacks)
    if config.run_type == "robustness":
        from villa.engine.robustness import robustness

        return robustness(config)
    if config.run_type == "probe":
        from villa.engine.probing import probe

        return probe(config)
    if config.run_type == "attention":
        from villa.engine.looking import attention

        return attention(config)
    if config.run_type == "predict":
        from villa.engine.prediction import predict

        return predict(config)
    from villa.engine.inference import evaluate

    return evaluate(config)


def run_recipe(configs: Sequence[RunConfig], callbacks: Sequence[Callback] = ()) -> int:
    """Run a recipe, or its stages; see ``run`` and ``run_stages``."""
    return run(configs[0], callbacks) if len(configs) == 1 else run_stages(configs, callbacks)


def run_stages(configs: Sequence[RunConfig], callbacks: Sequence[Callback] = ()) -> int:
    """Train stage after stage; with ``checkpoint.resume``, skip finished ones.

    Args:
        configs: the recipes.
        callbacks: callbacks of every stage, besides those that the recipes name.

    Returns:
        0, or the exit code of the stage that was interrupted.

    Raises:
        VillaError: a stage's recipe, data, folder or checkpoints cannot be used; the message names the stage. Folders
            and data of all stages are checked before the first one trains.
    """
    for number, config in enumerate(configs, start=1):
        with about(f"stage {number}"):
            refuse_used(Path(config.output_dir), resume=config.checkpoint.resume)
    passed = {i for i, config in enumerate(configs, start=1) if config.checkpoint.resume and is_finished(config)}
    waiting = [number for number in range(1, len(configs) + 1) if number not in passed]
    for number in waiting[1:]:
        with about(f"stage {number}"):
            _open_data(configs[number - 1])
    for number, config in enumerate(configs, start=1):
        state = "" if number in waiting else "finished, "
        print(f"stage {number} of {len(configs)} ({config.name}): {state}{config.output_dir}", flush=True)
        if number not in waiting:
            continue
        with about(f"stage {number}"):
            code = run(config, callbacks)
        if code:
            return code
    return 0


def _open_data(config: RunConfig) -> None:
    """Open a later stage's data early, so that missing files are reported now."""
    data: TaskDataset = DATASETS.get(config.dataset.name)(config.dataset)
    data.split("train")
