"""The interface of launchers, which run a checked recipe somewhere, and the launcher ``inline``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from villa.config.schema import RunConfig
from villa.config.validate import TRAINING_RUNS
from villa.errors import ConfigError
from villa.registry import LAUNCHERS, register_launcher


@dataclass
class LauncherConfig:
    """Options that every launcher has: its registered name."""

    name: str = "inline"


@dataclass(frozen=True)
class Request:
    """A run to launch.

    Attributes:
        arguments: arguments of ``villa_run``.
        configs: the checked configuration, or one for each stage.
    """

    arguments: tuple[str, ...]
    configs: Sequence[RunConfig]

    @property
    def inner(self) -> tuple[str, ...]:
        """The arguments of the processes that run it and, if it trains, resume from the run's folder."""
        kept = (text for text in self.arguments if not text.startswith(("launcher=", "launcher.")))
        trains = all(config.run_type in TRAINING_RUNS for config in self.configs)
        return (*kept, "launcher=inline", *(["checkpoint.resume=true"] if trains else []))

    @property
    def folder(self) -> Path:
        """The run's ``output_dir``; with stages, the parent folder of theirs."""
        first = Path(self.configs[0].output_dir)
        return first if len(self.configs) == 1 else first.parent

    def check_processes(self, count: int) -> None:
        """Refuse several processes for a recipe with ``distributed.strategy=single``.

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
        """Refuse a request that cannot run there, before anything is written or started.

        Raises:
            ConfigError: saying why.
        """

    @abstractmethod
    def launch(self, request: Request) -> int:
        """Run or submit it; return the exit code.

        Raises:
            ConfigError: it cannot run there.
        """


@register_launcher("inline")
class Inline(Launcher):
    """Runs in this process, which may be one of several started by torchrun or a job."""

    def launch(self, request: Request) -> int:
        """Run the recipe, or its stages."""
        from villa.engine.run import run_recipe

        return run_recipe(request.configs)


class Queue(Launcher):
    """A launcher that submits runs to a queue, several of them as one job array."""

    @property
    @abstractmethod
    def follow(self) -> bool:
        """Whether to wait until submitted runs have ended."""

    @abstractmethod
    def submit(self, requests: Sequence[Request], folder: Path, at_once: int | None) -> list[str]:
        """Submit runs; return the ids of their jobs.

        Args:
            requests: the runs.
            folder: folder for the jobs' files outside the runs' own folders.
            at_once: most runs at once; None leaves it to the queue.

        Raises:
            ConfigError: the queue refuses them; nothing was submitted.
        """

    @abstractmethod
    def alive(self) -> frozenset[str]:
        """Return the ids of the user's pending and running jobs.

        Raises:
            ConfigError: the queue does not answer.
        """


def launcher_of(config: RunConfig) -> Launcher:
    """Return the launcher that a recipe names."""
    made: Launcher = LAUNCHERS.get(config.launcher.name)(config.launcher)
    return made
