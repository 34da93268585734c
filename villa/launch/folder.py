"""The folder of a run's jobs: the resolved recipe, a script that resumes the run, and the logs of all ranks."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import villa
from villa.config.printer import to_yaml
from villa.config.values import is_one_line
from villa.errors import ConfigError
from villa.files import atomic_write
from villa.launch.base import Request

if TYPE_CHECKING:
    from submitit import Job

#: Subfolder of the run's ``output_dir``.
JOBS = "jobs"
RESUME = "resume.sh"


def prepare(request: Request) -> Path:
    """Write the recipe and the resuming script; return the folder.

    Args:
        request: the run.

    Raises:
        ConfigError: the folder's path has a line break, after which a job script would read a command.
    """
    folder = request.folder / JOBS
    if not is_one_line(str(folder.absolute())):
        raise ConfigError(f"jobs are not started from {str(folder.absolute())!r}: rename what has a line break in it")
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


def python_command() -> list[str]:
    """Return the command of Python: with ``-P``, unless villa is in the working folder."""
    is_here = Path(villa.__file__).parents[1] == Path.cwd()
    return [sys.executable, *([] if is_here else ["-P"])]


def job_folders(folder: Path) -> Path:
    """Return the pattern of the folders that submitit makes for jobs.

    A job runs the pickle in its folder. The random name makes sure that this is the pickle written for the job, and not
    one that was already in a ``folder`` obtained from others.
    """
    return folder / f".{secrets.token_hex(8)}" / "%j"


def link_logs(jobs: Path, job: Job[Any]) -> Path:
    """Link a job's folder into the folder of its run's jobs, under the job's id.

    Args:
        jobs: folder returned by ``prepare``.
        job: the job.

    Returns:
        The log of its first process.
    """
    log = job.paths.stdout
    link = jobs / job.job_id
    try:
        link.symlink_to(os.path.relpath(log.parent, jobs), target_is_directory=True)
    except OSError:  # a link from another machine exists, or the file system has no links
        return log
    return link / log.name
