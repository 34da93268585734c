"""Sources of trained models: the common interface, and checkpoints of runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from villa.checkpoints.files import Checkpoint
from villa.checkpoints.layout import CHECKPOINTS, CONFIG, METRICS, UNFINISHED, UNFINISHED_OUTPUTS
from villa.checkpoints.weight_files import refuse_not_finite
from villa.config.layers import read_stored
from villa.config.values import Layer
from villa.distributed.strategy import Strategy
from villa.errors import CheckpointError
from villa.evaluation.results import read_metrics
from villa.models.base import Model


@dataclass(frozen=True)
class Source(ABC):
    """A trained model on the disk.

    Attributes:
        path: its folder.
        update: number of updates that it was trained for.
    """

    path: Path
    update: int

    @abstractmethod
    def recipe(self) -> list[Layer]:
        """Return the layers of the recipe that the model was trained with."""

    @abstractmethod
    def assets(self) -> Any:
        """Return a context manager that yields the folder with vocabulary and labels, perhaps a temporary one."""

    @abstractmethod
    def load_into(self, model: Model) -> None:
        """Load the weights into a model built from the recipe.

        Raises:
            CheckpointError: they cannot be read, or belong to another model.
        """

    def results(self, run_type: str) -> Path:
        """Return an unused folder for the results of ``run_type``; the source's own may be shared or a cache."""
        return unused(Path("outputs") / f"{place_name(self.path)}-{run_type}")

    def metrics(self) -> dict[str, Any] | None:
        """Return the content of the ``metrics.json`` of these weights, if there is one."""
        return None

    def provenance(self) -> dict[str, Any]:
        """Return what produced the weights, as far as known: software, fingerprint of the ``data``, and ``seed``."""
        return {}


def unused(folder: Path) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3``, ..., that is not there, or not finished."""
    candidate, number = folder, 1
    while candidate.exists() and not ((candidate / UNFINISHED).exists() or any(candidate.glob(UNFINISHED_OUTPUTS))):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def place_name(path: Path) -> str:
    """Return the name of a model's folder; in the hub's cache, where that is a revision, the model's name."""
    path = path.resolve() if path.name in ("", "..") else path
    return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


@dataclass(frozen=True)
class CheckpointSource(Source):
    """A verified checkpoint of a run.

    Attributes:
        weights: which weights to load: the running ``average`` if there is one, or the ``live`` ones.
    """

    weights: Literal["average", "live"] = "average"

    def recipe(self) -> list[Layer]:
        """Read the recipe that was saved with the checkpoint."""
        return [read_stored(self.path / CONFIG)]

    @contextmanager
    def assets(self) -> Iterator[Path]:
        """Yield the checkpoint's folder of assets."""
        yield self._checkpoint.assets

    def load_into(self, model: Model) -> None:
        """Load the checkpoint's weights."""
        averaged = self.weights == "average" and self._checkpoint.averaged
        load_model(model, self._checkpoint, averaged=averaged)
        if averaged:
            print(f"{self.path}: the running average of the weights (checkpoint.weights=live for the last ones)")
        refuse_not_finite(self.path, model.named_parameters())

    def results(self, run_type: str) -> Path:
        """Return a folder beside the run's files."""
        return unused(self._run / run_type)

    def metrics(self) -> dict[str, Any] | None:
        """Return the run's results if they are of this checkpoint and not of a later or better one."""
        file = self._run / METRICS
        found = read_metrics(file, "move it away") if file.is_file() else {}
        return found if found.get("protocol", {}).get("update") == self.update else None

    def provenance(self) -> dict[str, Any]:
        """Return the provenance recorded by the run."""
        return dict(self._checkpoint.plain_state().get("provenance", {}))

    @property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.path, self.update)

    @property
    def _run(self) -> Path:
        return self.path.parents[1] if self.path.parent.name == CHECKPOINTS else self.path.parent


def load_model(
    model: Model, checkpoint: Checkpoint, strategy: Strategy | None = None, *, averaged: bool = False
) -> None:
    """Load a checkpoint's weights.

    Args:
        model: the model, perhaps sharded.
        checkpoint: a checkpoint of the whole model.
        strategy: how the model is distributed; by default in one process.
        averaged: load the running average of the weights, if the checkpoint holds one.

    Raises:
        CheckpointError: they cannot be read, or belong to another model.
    """
    strategy = strategy or Strategy()
    own = {name: strategy.shape(value) for name, value in model.state_dict(keep_vars=True).items()}
    saved = (checkpoint.averaged_state if averaged else checkpoint.model_state)(model.state_dict())
    for name in sorted(saved.keys() | own.keys()):
        ours = list(own[name]) if name in own else None
        theirs = list(saved[name].shape) if name in saved else None
        if ours != theirs:
            shapes = [f"of shape {shape}" if shape is not None else "missing" for shape in (theirs, ours)]
            raise CheckpointError(
                f"checkpoint '{checkpoint.path}' is of another model: '{name}' is {shapes[0]} in it and {shapes[1]} "
                "here; use the recipe that it was trained with"
            )
    strategy.load_state_dict(model, saved)
