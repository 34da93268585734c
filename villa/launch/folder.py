"""The folder of a run's jobs: the resolved recipe, the command to go on by hand, and the logs of all ranks."""

from __future__ import annotations

import shlex
from pathlib import Path

from villa.config.printer import to_yaml
from villa.files import atomic_write
from villa.launch.base import Request

#: Below the run's ``output_dir``.
JOBS = "jobs"
RESUME = "resume.sh"


def prepare(request: Request) -> Path:
    """Write the recipe and the command, and return the folder.

    Args:
        request: what is to run; its folder is that of the first stage, or the one that all stages are below.
    """
    first = Path(request.configs[0].output_dir)
    folder = (first if len(request.configs) == 1 else first.parent) / JOBS
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
