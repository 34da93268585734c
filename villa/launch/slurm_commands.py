"""Queries of SLURM through its commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from villa.errors import ConfigError

#: Final states of a job.
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
    """Ask SLURM whether it would accept a job.

    Args:
        parameters: options of sbatch.

    Raises:
        ConfigError: it would refuse the job, or does not answer.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]
    found = ask(["sbatch", "--test-only", *options, "--wrap=true"])
    if found.returncode:
        given = " ".join(options)
        raise ConfigError(
            f"SLURM refuses the job ({reason(found.stderr)}); change launcher.* (it was asked for {given})"
        )


def jobs_alive() -> frozenset[str]:
    """Return the ids of the user's pending and running jobs; those of arrays have the form ``12_3``.

    Raises:
        ConfigError: SLURM does not answer.
    """
    found = ask(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"])
    if found.returncode:
        raise ConfigError(f"squeue does not list the jobs ({reason(found.stderr)}); try again")
    jobs = (line.split() for line in found.stdout.splitlines())
    return frozenset(number for number, state, *_ in jobs if state not in _ENDED)


def described(kind: str, name: str) -> dict[str, str]:
    """Return SLURM's description of a job or node, or nothing if SLURM does not answer.

    Args:
        kind: ``job`` or ``node``.
        name: name of the node, or id of the job.
    """
    try:
        shown = ask(["scontrol", "show", kind, "-o", name])
    except ConfigError:
        return {}
    return dict(re.findall(r"(\w+)=(\S+)", shown.stdout)) if shown.returncode == 0 else {}


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM, which may fail, and return its result.

    Raises:
        ConfigError: it is not installed, or takes longer than a minute.
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
    """Return the last line of a SLURM command's output, without its prefix."""
    lines = said.strip().splitlines()
    return re.sub(r"^(s\w+: error: |allocation failure: )+", "", lines[-1] if lines else "no reason given")
