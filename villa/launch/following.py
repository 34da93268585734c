"""Waiting for submitted jobs while showing what their first process prints."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit import Job

#: Seconds between looks.
_PAUSE = 0.5


def follow(job: Job[Any]) -> int:
    """Show what a job's first process prints until the job has ended; return 0, or 1 if it failed.

    Ctrl-C stops following; the job goes on.
    """
    shown = 0
    try:
        while not job.done():
            shown = _show(job, shown)
            time.sleep(_PAUSE)
    except KeyboardInterrupt:
        print(f"\njob {job.job_id} goes on; its log: {job.paths.stdout}", flush=True)
        return 0
    _show(job, shown)
    if job.exception() is None:
        return 0
    print(f"job {job.job_id} failed; its logs: {job.paths.stdout.parent}", flush=True)
    return 1


def _show(job: Job[Any], shown: int) -> int:
    path = job.paths.stdout
    if not path.is_file():
        return shown
    with path.open("rb") as log:
        log.seek(shown)
        text = log.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(text)
