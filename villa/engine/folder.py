"""A run's output folder: claimed by one process at a time, and never overwritten by accident."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from villa.engine.checkpoint import FOLDER as CHECKPOINTS
from villa.errors import ConfigError
from villa.plugins import one_line

CONFIG, LOG, METRICS, CURVES = "config.yaml", "log.jsonl", "metrics.json", "curves.png"

#: Names whose presence shows that a folder holds a run.
TRACES = (CONFIG, LOG, METRICS, CHECKPOINTS)


@contextmanager
def claim(folder: Path, *, resume: bool) -> Iterator[Path]:
    """Hold a run's folder for this process, making it if need be.

    Args:
        folder: the run's ``output_dir``.
        resume: whether a run that the folder holds may be gone on with.

    Raises:
        ConfigError: it holds a run that is not to be resumed, another process is using it, or it cannot be made.
    """
    used = next((name for name in TRACES if (folder / name).exists()), None)
    if used is not None and not resume:
        raise ConfigError(
            f"output_dir '{folder}' already holds a run ({used}); set checkpoint.resume=true to go on with it, "
            "or give another output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"output_dir '{folder}' cannot be used: {one_line(error)}; give another one") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir '{folder}' is in use by another process; wait for it or give another one"
            ) from None
        yield folder


def unused(folder: Path) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3``, ... that does not hold anything yet."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
