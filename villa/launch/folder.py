"""The folder of a run's jobs: the resolved recipe, the command to go on by hand, and the logs of all ranks."""

from __future__ import annotations

import os
import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from villa.config.printer import to_yaml
from villa.files import atomic_write
from villa.launch.base import Request

if TYPE_CHECKING:
    from submitit import Job

#: Below the run's ``output_dir``.
JOBS = "jobs"
RESUME = "resume.sh"


def prepare(request: Request) -> Path:
    """Write the recipe and the command, and return the folder.

    Args:
        request: what is to run.
    """
    folder = request.folder / JOBS
    for number, config in enumerate(request.configs, start=1):
        name = "config.yaml" if len(request.configs) == 1 else f"config_stage{number}.yaml"
        atomic_write(folder / name, to_yaml(config))
    command = shlex.join(["villa_run", *request.inner])
    lines = [
        "#!/bin/sh",
        "# Goes on with this run in one process; for several: torchrun --nproc-per-node N -m villa.cli.run ...",
        f"cd {shlex.quote(str(Path.cwd()))} && exec {command}",
    ]
    text = "".join(f"{line}\n" for line in lines)
    atomic_write(folder / RESUME, text)
    return folder


def job_folders(folder: Path) -> Path:
    """Return the pattern of the folders that submitit gives jobs.

    A job runs what the pickle in its folder says. The name is one that nobody knows before, so that this is the pickle
    that was put there for the job, and never one that was in ``folder`` already when the user got it from others.
    """
    return folder / f".{secrets.token_hex(8)}" / "%j"


def link_logs(jobs: Path, job: Job[Any]) -> Path:
    """Make what a job leaves appear in the folder of its run's jobs, called after it.

    Args:
        jobs: what ``prepare`` has returned.
        job: the job.

    Returns:
        The log of its first process.
    """
    log = job.paths.stdout
    link = jobs / job.job_id
    try:
        link.symlink_to(os.path.relpath(log.parent, jobs), target_is_directory=True)
    except OSError:  # there is one of another machine, or the disk has no links
        return log
    return link / log.name
