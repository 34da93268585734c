"""What a launcher owes the command: it makes a checked recipe run somewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from villa.config.schema import RunConfig
from villa.errors import ConfigError


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

    @abstractmethod
    def launch(self, request: Request) -> int:
        """Run it, or hand it over; return the exit code.

        Raises:
            ConfigError: it cannot run there.
        """
