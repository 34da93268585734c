"""What a launcher owes the command: it makes a checked recipe run somewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from villa.config.schema import RunConfig
from villa.errors import ConfigError
from villa.registry import LAUNCHERS, register_launcher


@dataclass
class LauncherConfig:
    """Options that every launcher has: its registered name."""

    name: str = "inline"


@dataclass(frozen=True)
class Request:
    """What is to run.

    Attributes:
        arguments: of ``villa_run``.
        configs: the recipe that they make, or those of its stages, checked.
    """

    arguments: tuple[str, ...]
    configs: Sequence[RunConfig]

    @property
    def inner(self) -> tuple[str, ...]:
        """The arguments of the processes that run it: they go on with what the run's folder holds."""
        kept = (text for text in self.arguments if not text.startswith(("launcher=", "launcher.")))
        return (*kept, "launcher=inline", "checkpoint.resume=true")

    @property
    def folder(self) -> Path:
        """Folder of the run: its ``output_dir``, or the one that those of all stages are below."""
        first = Path(self.configs[0].output_dir)
        return first if len(self.configs) == 1 else first.parent

    def check_processes(self, count: int) -> None:
        """Refuse several processes for a recipe of one.

        Raises:
            ConfigError: naming the option.
        """
        if count > 1 and any(config.distributed.strategy == "single" for config in self.configs):
            raise ConfigError(
                f"the launcher would start {count} processes, but distributed.strategy is 'single', which has one; set "
                "distributed.strategy=ddp or fsdp"
            )


class Launcher(ABC):
    """Starts a run.

    Args:
        config: its options.
    """

    Config: ClassVar[type[LauncherConfig]] = LauncherConfig
    config: LauncherConfig

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()

    def check(self, request: Request) -> None:  # noqa: B027 (not every launcher has something to refuse)
        """Refuse what cannot run there, before anything is written or started.

        Raises:
            ConfigError: saying why.
        """

    @abstractmethod
    def launch(self, request: Request) -> int:
        """Run it, or hand it over; return the exit code.

        Raises:
            ConfigError: it cannot run there.
        """


@register_launcher("inline")
class Inline(Launcher):
    """Runs in this process, or this one's part of a run that torchrun or a job shares among several."""

    def launch(self, request: Request) -> int:
        """Run the recipe, or its stages."""
        from villa.engine.run import run, run_stages

        return run(request.configs[0]) if len(request.configs) == 1 else run_stages(request.configs)


class Queue(Launcher):
    """A launcher that hands runs over to a queue, which starts them some time, and many of them as one array."""

    @property
    @abstractmethod
    def follow(self) -> bool:
        """Whether to wait until they have ended."""

    @abstractmethod
    def submit(self, requests: Sequence[Request], folder: Path, at_once: int | None) -> list[str]:
        """Hand runs over, and return the ids of their jobs.

        Args:
            requests: the runs.
            folder: of what the jobs leave besides the runs' own folders.
            at_once: how many of them may run at once; None leaves it to the queue.

        Raises:
            ConfigError: the queue refuses them; nothing was submitted.
        """

    @abstractmethod
    def alive(self) -> frozenset[str]:
        """Return the ids of the user's jobs that wait or run.

        Raises:
            ConfigError: the queue does not answer.
        """


def launcher_of(config: RunConfig) -> Launcher:
    """Return the launcher that a recipe names."""
    made: Launcher = LAUNCHERS.get(config.launcher.name)(config.launcher)
    return made
