"""Trackers of other packages: Weights & Biases, MLflow and trackio.

Where they write, offline or to a server, their own environment variables say. A resumed run goes on with the run that
they had; values logged after the last checkpoint of an interrupted run stay in it.
"""

from __future__ import annotations

import importlib
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from villa.errors import ConfigError
from villa.registry import register_tracker
from villa.tracking import TrackedRun, Tracker, json_number, table

#: Most predictions of a table.
_ROWS = 1000
#: Longest value of a parameter that MLflow takes, and most values of a request.
_LONGEST, _MOST = 6000, 100


class PackageTracker(Tracker):
    """Base of the trackers that need an optional package.

    Args:
        run: the run.

    Attributes:
        package: the package's name, which is also the tracker's.
        run: the run.
        id: the run's id at the tracker, by which a resumed run finds it.
    """

    package: str

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.id: str | None = secrets.token_hex(4)
        self._opened: Any = None
        try:
            self.module = importlib.import_module(self.package)
        except ImportError as error:
            raise ConfigError(
                f"logging.trackers: '{self.package}' is not installed; pip install 'villa[trackers]', or leave it out"
            ) from error

    @classmethod
    def of(cls, run: TrackedRun) -> Tracker:
        """Return the tracker of a run."""
        return cls(run)

    @property
    def opened(self) -> Any:
        """The package's own run, started when it is first needed."""
        if self._opened is None:
            self._opened = self.start()
        return self._opened

    def start(self) -> Any:
        """Start, or go on with, the package's own run."""
        raise NotImplementedError

    def add(self, path: Path) -> None:
        """Log a figure as an image, and predictions as a table."""
        if path.suffix == ".png":
            self.opened.log({path.stem: self.module.Image(str(path))})
        elif path.suffix == ".jsonl":
            columns, rows = table(path, _ROWS)
            self.opened.log({path.stem: self.module.Table(columns=columns, data=[[*map(_plain, row)] for row in rows])})

    def finish(self) -> None:
        """End the package's own run, which has been started, and wait for what is on its way."""
        self.opened.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return the run's id."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run of an id."""
        self.id = state["id"]

    def close(self) -> None:
        """End the run, if it was started."""
        if self._opened is not None:
            self.finish()
            self._opened = None


@register_tracker("wandb")
class WandbTracker(PackageTracker):
    """Weights & Biases (``WANDB_MODE=offline`` writes to the run's folder alone)."""

    package = "wandb"

    def start(self) -> Any:
        """Start or resume the run; ``update`` is the x axis of all values."""
        opened = self.module.init(
            project=self.run.project,
            name=self.run.name,
            id=self.id,
            resume="allow",
            dir=str(self.run.folder),
            config=dict(self.run.values),
            settings=self.module.Settings(silent=True, console="off"),
        )
        opened.define_metric("update")
        opened.define_metric("*", step_metric="update")
        return opened

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Log values as ``<kind>/<name>``."""
        self.opened.log({**{f"{kind}/{name}": float(value) for name, value in values.items()}, "update": update})


@register_tracker("mlflow")
class MlflowTracker(PackageTracker):
    """MLflow (``MLFLOW_TRACKING_URI``); the project is its experiment."""

    package = "mlflow"

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self.id = None  # MLflow chooses it

    def start(self) -> Any:
        """Start or resume the run; the recipe's values are its parameters."""
        client = self.module.MlflowClient()
        if self.id is None:
            found = client.get_experiment_by_name(self.run.project)
            experiment = client.create_experiment(self.run.project) if found is None else found.experiment_id
            self.id = client.create_run(experiment, run_name=self.run.name).info.run_id
            parameter = self.module.entities.Param
            values = [parameter(key, str(value)[:_LONGEST]) for key, value in self.run.values.items()]
            for start in range(0, len(values), _MOST):
                client.log_batch(self.id, params=values[start : start + _MOST])
            client.log_text(self.id, self.run.recipe, "config.yaml")
        else:
            client.set_terminated(self.id, status="RUNNING")
        return client

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Log values as ``<kind>/<name>``."""
        metric, now = self.module.entities.Metric, int(1000 * time.time())
        self.opened.log_batch(
            self.id, [metric(f"{kind}/{name}", float(value), now, update) for name, value in values.items()]
        )

    def add(self, path: Path) -> None:
        """Keep the file as an artifact."""
        self.opened.log_artifact(self.id, str(path))

    def finish(self) -> None:
        """Mark the run as finished."""
        self.opened.set_terminated(self.id)


@register_tracker("trackio")
class TrackioTracker(PackageTracker):
    """trackio (``TRACKIO_DIR``), whose runs are known by their names: the run's, with its id."""

    package = "trackio"

    def start(self) -> Any:
        """Start or resume the run."""
        return self.module.init(
            project=self.run.project,
            name=f"{self.run.name}-{self.id}",
            config={key: _plain(value) for key, value in self.run.values.items()},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Log values as ``<kind>/<name>``."""
        self.opened.log({f"{kind}/{name}": json_number(value) for name, value in values.items()}, step=update)


def _plain(value: Any) -> Any:
    """Return a value that every tracker takes: a number, text, a bool or None."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
