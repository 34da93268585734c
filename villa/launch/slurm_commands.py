"""What is asked of SLURM by its commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from villa.errors import ConfigError

#: States of a job that SLURM does nothing about any more.
_ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
)


def try_submission(parameters: Mapping[str, Any]) -> None:
    """Ask SLURM whether it would take such a job.

    Args:
        parameters: options of sbatch.

    Raises:
        ConfigError: it would refuse it, or does not answer.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]
    found = ask(["sbatch", "--test-only", *options, "--wrap=true"])
    if found.returncode:
        given = " ".join(options)
        raise ConfigError(
            f"SLURM refuses the job ({reason(found.stderr)}); change launcher.* (it was asked for {given})"
        )


def jobs_alive() -> frozenset[str]:
    """Return the ids of the user's jobs that wait or run; those of arrays are of the form ``12_3``.

    Raises:
        ConfigError: SLURM does not answer.
    """
    found = ask(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"])
    if found.returncode:
        raise ConfigError(f"squeue does not tell which jobs there are ({reason(found.stderr)}); try again")
    jobs = (line.split() for line in found.stdout.splitlines())
    return frozenset(number for number, state, *_ in jobs if state not in _ENDED)


def described(kind: str, name: str) -> dict[str, str]:
    """Return what SLURM says of a job or node; nothing where that cannot be found out.

    Args:
        kind: ``job`` or ``node``.
        name: of the node, or the id of the job.
    """
    try:
        shown = ask(["scontrol", "show", kind, "-o", name])
    except ConfigError:
        return {}
    return dict(re.findall(r"(\w+)=(\S+)", shown.stdout)) if shown.returncode == 0 else {}


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM; it may fail.

    Raises:
        ConfigError: it is not there, or takes longer than a minute.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise ConfigError("SLURM does not answer within a minute; try again, or ask its administrator") from error
    except OSError as error:
        raise ConfigError(
            f"launcher=slurm cannot run {command[0]} ({error.strerror}); start it on a login node"
        ) from error


def reason(said: str) -> str:
    """The last line of what a command of SLURM said, without its prefix."""
    lines = said.strip().splitlines()
    return re.sub(r"^(s\w+: error: |allocation failure: )+", "", lines[-1] if lines else "it does not say why")
