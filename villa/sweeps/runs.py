"""One run of a sweep."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from villa.config.loader import load_stages
from villa.config.schema import RunConfig
from villa.config.validate import TRAINING_RUNS
from villa.config.yaml_text import write
from villa.engine.run_folder import is_finished
from villa.errors import ConfigError, about
from villa.launch.base import Launcher, Request, launcher_of
from villa.sweeps.axes import Point


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        point: its values of the axes.
        arguments: arguments of ``villa_run``.
        configs: the configuration, or one for each stage.
    """

    point: Point
    arguments: tuple[str, ...]
    configs: Sequence[RunConfig]

    @classmethod
    def load(
        cls, arguments: Sequence[str], point: Point, folder: Path, run_types: Collection[str] = TRAINING_RUNS
    ) -> Run:
        """Load and check a run.

        Args:
            arguments: arguments of ``villa_run`` for all runs.
            point: its values of the axes.
            folder: folder of the sweep; the run's folder is in it.
            run_types: what it may do.

        Raises:
            ConfigError: the recipe is wrong, or does something else.
        """
        own = (*arguments, *point.overrides, f"output_dir={write(str(folder / point.name))}", "logging.progress=off")
        with about(f"run {point.name}"):
            configs = [stage.config for stage in load_stages(own)]
        if configs[-1].run_type not in run_types:
            raise ConfigError(f"run_type={configs[-1].run_type} does not go with a sweep, whose runs train")
        resumes = configs[-1].run_type in TRAINING_RUNS  # attacks go on by themselves
        return cls(point, (*own, *(["checkpoint.resume=true"] if resumes else [])), configs)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.point.name

    @property
    def finished(self) -> bool:
        """Whether all its stages are finished."""
        return all(map(is_finished, self.configs))

    @property
    def launcher(self) -> Launcher:
        """The launcher of its recipe."""
        return launcher_of(self.configs[0])

    @property
    def request(self) -> Request:
        """The request to its launcher."""
        return Request(self.arguments, self.configs)
