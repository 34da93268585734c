"""What a submitted job does: ``villa_run`` as one of the run's processes; a pre-empted one comes back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


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
        """Run; a run that was told to end by pre-emption is handed back to the queue by its first process.

        Raises:
            JobFailed: it ended with another exit code.
        """
        from submitit import JobEnvironment

        from villa.engine.callbacks.signals import PREEMPTED

        _export_place()
        code = self._run()
        if code == 128 + PREEMPTED and JobEnvironment().global_rank == 0:
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
