"""What a submitted job does: ``villa_run`` as one of the run's processes; a pre-empted one comes back."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from villa.errors import ConfigError
from villa.launch.slurm_commands import ask, described, reason

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from villa.distributed.watch import End

#: The port of SLURM's daemon on a node that does not say its own, and the seconds until it surely does not answer.
_SLURMD, _PATIENCE = 6818, 5.0


class JobFailed(Exception):  # noqa: N818 (its name is what the job's log shows)
    """The run ended with an exit code other than 0; its log says why."""


@dataclass
class RunJob:
    """A run as one process of a job sees it.

    Attributes:
        arguments: of ``villa_run``; the run goes on with what its folder holds.
    """

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run; a run that SLURM has told to end is handed back to the queue by its first process.

        Raises:
            JobFailed: it ended with another exit code.
        """
        from submitit import JobEnvironment

        from villa.signals import PREEMPTED

        _export_place()
        if os.environ.get("SLURM_JOB_ID"):
            from villa.distributed.watch import ON_LOST

            ON_LOST.append(_requeue_if_a_node_failed)
        code = self._run()
        if JobEnvironment().global_rank == 0 and (code == 128 + PREEMPTED or _ended_for_others(code)):
            os.kill(os.getpid(), PREEMPTED)  # to submitit's own handler: it saves this object and requeues the job
        if code:
            raise JobFailed(f"villa_run ended with exit code {code}")
        return code

    def _run(self) -> int:
        from villa.cli.run import main

        try:
            return main(self.arguments)
        except SystemExit as error:  # another process has said what was wrong
            return error.code if isinstance(error.code, int) else 1

    def checkpoint(self) -> DelayedSubmission:
        """Return what the requeued job does: the same; called by submitit."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _export_place() -> None:
    """Say which process this is the way torchrun does."""
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _ended_for_others(code: int) -> bool:
    """Whether a run was ended by a SIGTERM with which SLURM pre-empts the job.

    That is all that SLURM sends unless its administrator has set ``preempt_send_user_signal``; and it does not take a
    job back by itself that ends before its grace is over. A job that is cancelled is not running any more.
    """
    if code != 128 + signal.SIGTERM or not os.environ.get("SLURM_JOB_ID"):
        return False
    from submitit import JobEnvironment

    found = described("job", JobEnvironment().job_id)
    return found.get("JobState") == "RUNNING" and found.get("PreemptTime", "None") != "None"


def _requeue_if_a_node_failed(end: End) -> None:
    """Put the job back into SLURM's queue if the node of the lost process is gone; else the process was killed.

    SLURM would do so by itself, but not before it misses the node: this process's own end would be a failure by then.
    """
    if _answers(end.host):
        return
    print(f"node {end.host} does not answer: the job goes back into the queue", flush=True)
    try:
        asked = ask(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
    except ConfigError as error:
        print(error, flush=True)
        return
    if asked.returncode:
        print(f"SLURM does not put it back ({reason(asked.stderr)})", flush=True)


def _answers(node: str) -> bool:
    """Whether SLURM's daemon on a node answers; also where that cannot be found out."""
    found = described("node", node)
    if not found:
        return True
    address = (found.get("NodeAddr", node), int(found.get("Port", _SLURMD)))
    try:
        socket.create_connection(address, timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
