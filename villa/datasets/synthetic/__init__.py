"""Small generated databases in the released formats, to try a recipe without its data (``dataset.synthetic=true``)."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from villa.datasets.cache_folder import cache_root
from villa.datasets.synthetic.tasks import TASKS, write_databases
from villa.errors import DataError, nearest
from villa.files import fsync_tree, locked, no_space

#: Version of the generated data; raise it with every change, so that older caches are not used.
VERSION = 2
#: Training examples; validation and test get a quarter of them each.
EXAMPLES = 512


def databases(task: str, examples: int = EXAMPLES, write: Callable[[str, int, Path], None] | None = None) -> Path:
    """Return a folder with the databases of all splits, generating them if they are not in the cache.

    They follow a rule that a small model learns in seconds; see ``villa.datasets.synthetic.tasks``. The same task and
    size give the same databases on every machine. Of several processes that call this at once, one generates.

    Args:
        task: registered name of the data set.
        examples: training examples.
        write: writes the files of a task, given the number of examples, into a folder that does not exist yet; by
            default the databases of UNITER's tasks.

    Returns:
        The folder, by default laid out as ``DatabasePaths.synthetic`` says.

    Raises:
        DataError: there is no generator for the task, or the cache cannot be written.
    """
    if write is None and task not in TASKS:
        raise DataError(
            f"there is no synthetic data for dataset '{task}'{nearest(task, TASKS)} (there is for {', '.join(TASKS)}); "
            "set dataset.synthetic=false"
        )
    key = hashlib.sha256(json.dumps([VERSION, task, examples]).encode()).hexdigest()[:16]
    folder = cache_root() / "synthetic" / f"{task}-{key}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _generate(task, examples, folder, write or write_databases)
    except OSError as error:
        raise DataError(
            f"the synthetic data '{folder}' cannot be written: {no_space(error) or error.strerror or error}; make "
            "room, or choose another place by VILLA_CACHE"
        ) from error
    return folder


def _generate(task: str, examples: int, folder: Path, write: Callable[[str, int, Path], None]) -> None:
    """Write into a temporary folder and rename it; the caller holds the lock."""
    for left in folder.parent.glob(f"{folder.name}.*tmp"):
        shutil.rmtree(left, ignore_errors=True)  # left by a killed process
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")  # unpredictable: nobody can plant a link
    write(task, examples, temporary)
    fsync_tree(temporary)
    temporary.rename(folder)
