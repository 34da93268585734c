"""The function of a submitted job: ``villa_run`` as one of the run's processes, requeued when pre-empted."""

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

#: Default port of SLURM's daemon on a node, and the seconds to wait for its answer.
_SLURMD, _PATIENCE = 6818, 5.0


class JobFailed(Exception):  # noqa: N818 (the job's log shows this name)
    """The run ended with an exit code other than 0; its log says why."""


@dataclass
class RunJob:
    """A run, as one process of a job executes it.

    Attributes:
        arguments: arguments of ``villa_run``, with which the run resumes from its folder.
    """

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run; the first process of a run that SLURM has told to end requeues the job.

        Raises:
            JobFailed: the exit code is not 0.
        """
        from submitit import JobEnvironment

        from villa.signals import PREEMPTED

        _export_rank()
        if os.environ.get("SLURM_JOB_ID"):
            from villa.distributed.watch import ON_LOST

            ON_LOST.append(_requeue_if_a_node_failed)
        code = self._run()
        if JobEnvironment().global_rank == 0 and (code == 128 + PREEMPTED or _was_preempted(code)):
            os.kill(os.getpid(), PREEMPTED)  # submitit's handler saves this object and requeues the job
        if code:
            raise JobFailed(f"villa_run ended with exit code {code}")
        return code

    def _run(self) -> int:
        from villa.cli.run import main

        try:
            return main(self.arguments)
        except SystemExit as error:  # another process has reported the error
            return error.code if isinstance(error.code, int) else 1

    def checkpoint(self) -> DelayedSubmission:
        """Return the submission of the requeued job, which is the same; submitit calls this."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _export_rank() -> None:
    """Set the environment variables by which torchrun identifies a process."""
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _was_preempted(code: int) -> bool:
    """Return whether a run was ended by the SIGTERM with which SLURM pre-empts a job.

    SLURM sends nothing else unless its administrator has set ``preempt_send_user_signal``, and does not requeue a job
    that ends before its grace time is over. A cancelled job is not in state RUNNING.
    """
    if code != 128 + signal.SIGTERM or not os.environ.get("SLURM_JOB_ID"):
        return False
    from submitit import JobEnvironment

    found = described("job", JobEnvironment().job_id)
    return found.get("JobState") == "RUNNING" and found.get("PreemptTime", "None") != "None"


def _requeue_if_a_node_failed(end: End) -> None:
    """Requeue the job if the node of the lost process is gone; else the process was killed.

    SLURM does so by itself only after it notices that the node is gone: by then this process's end would be a failure.
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
        print(f"SLURM does not requeue it ({reason(asked.stderr)})", flush=True)


def _answers(node: str) -> bool:
    """Return whether SLURM's daemon on a node answers; True if that is unknown."""
    found = described("node", node)
    if not found:
        return True
    address = (found.get("NodeAddr", node), int(found.get("Port", _SLURMD)))
    try:
        socket.create_connection(address, timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
