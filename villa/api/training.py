"""Train from Python, and look at what runs have written."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from villa.api.predictor import Predictor, from_pretrained
from villa.checkpoints.layout import CONFIG, FINISHED, LOG, METRICS
from villa.config import RunConfig, from_yaml, load_stages, to_yaml
from villa.config.validate import TRAINING_RUNS
from villa.engine.loop import Callback
from villa.engine.run import run_recipe
from villa.errors import ConfigError
from villa.evaluation.figures import curves_figure
from villa.evaluation.results import read_metrics
from villa.launch.base import Request, launcher_of
from villa.tracking import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """A training run: what its folder holds.

    Args:
        folder: its output folder.
        stages: the runs of all its stages, if it has several; the run itself is the last one.

    Attributes:
        folder: its output folder.
        stages: its stages; only itself if it has one.
    """

    def __init__(self, folder: str | Path, stages: Sequence[Run] = ()) -> None:
        self.folder = Path(folder)
        self.stages = [*stages] or [self]

    def __repr__(self) -> str:
        """Return the folder, and whether the run has finished."""
        return f"Run({str(self.folder)!r}, {'finished' if self.finished else 'not finished'})"

    @property
    def config(self) -> RunConfig:
        """The resolved recipe.

        Raises:
            ConfigError: the folder holds none.
        """
        return from_yaml(self.folder / CONFIG)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; ``resume`` goes on with one that has not."""
        return (self.folder / FINISHED).is_file()

    @property
    def history(self) -> Any:
        """The values logged so far: a pandas ``DataFrame`` with a row a record, or a list of mappings without pandas.

        ``kind`` is ``train``, ``val`` or ``test``; see docs/outputs.md.
        """
        path = self.folder / LOG
        records = list(read_log(path)) if path.is_file() else []
        if importlib.util.find_spec("pandas") is None:
            return records
        return importlib.import_module("pandas").DataFrame(records)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The scores of each split that was tested; empty before the end of the run."""
        path = self.folder / METRICS
        found = read_metrics(path, "restore it") if path.is_file() else {}
        return {split: scores for split, scores in found.items() if split != "protocol"}

    @property
    def model(self) -> Predictor:
        """The trained model at its best checkpoint.

        Raises:
            CheckpointError: the folder holds no intact checkpoint.
        """
        return from_pretrained(self.folder, user_dir=self.config.user_dir)

    def plot(self) -> Figure:
        """Draw the training curves.

        Raises:
            DataError: nothing has been logged.
        """
        figure = curves_figure(self.folder / LOG, title=self.folder.name)
        _let_notebooks_show(type(figure))
        return figure

    def resume(self, *, callbacks: Sequence[Callback] = ()) -> Run:
        """Go on with a run, or its stages, that was interrupted, from the newest checkpoint.

        Args:
            callbacks: those that the run was started with.

        Raises:
            VillaError: the recipe, data or checkpoints cannot be used.
        """
        configs = [stage.config for stage in self.stages if (stage.folder / CONFIG).is_file()]
        return _run([_resuming(config) for config in configs], callbacks)


def _let_notebooks_show(kind: type) -> None:
    """Let a notebook show figures as pictures, which it does only after matplotlib.pyplot was imported."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and kind not in shell.display_formatter.formatters["image/png"].type_printers:
        shell.display_formatter.formatters["image/png"].for_type(kind, _png)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def train(
    recipe: str | Path | Mapping[str, Any] | RunConfig, *, callbacks: Sequence[Callback] = (), **options: Any
) -> Run:
    """Train as ``villa_run`` does, in this process.

    Ctrl-C, or a notebook's interrupt, ends the training after a checkpoint; ``run.resume()`` goes on with it.

    Args:
        recipe: path of a recipe, its sections as a mapping, or a configuration.
        callbacks: objects whose methods are called on the way; see ``villa.engine.loop.Callback``.
        options: values that win over the recipe: ``trainer="freelb"``, ``optimizer={"lr": 5e-4}``, or of a dotted key
            ``**{"optimizer.lr": 5e-4}``.

    Returns:
        The run; ``finished`` tells whether it came to its end.

    Raises:
        VillaError: the recipe, data, folder or checkpoints cannot be used.
    """
    if isinstance(callbacks, Mapping):
        raise ConfigError('callbacks takes objects; give registered ones as **{"callbacks.NAME.option": value}')
    given = [f"{name}={json.dumps(value, default=str)}" for name, value in options.items()]
    if isinstance(recipe, str | Path):
        given.insert(0, f"config={recipe}")
        stages = load_stages(given)
    else:
        written = to_yaml(recipe) if isinstance(recipe, RunConfig) else json.dumps(recipe, default=str)
        stages = load_stages(given, written)
    configs = [stage.config for stage in stages]
    other = next((config.run_type for config in configs if config.run_type not in TRAINING_RUNS), None)
    if other is not None:
        raise ConfigError(
            f"run_type is '{other}', which does not train; start it with villa_run, or see villa.robustness"
        )
    launcher = configs[0].launcher.name
    if launcher == "inline":
        return _run(configs, callbacks)
    if callbacks:
        raise ConfigError(f"launcher={launcher} starts other processes, which get no objects; register the callbacks")
    if not isinstance(recipe, str | Path):
        raise ConfigError(f"launcher={launcher} starts other processes, which read the recipe: give its path")
    launcher_of(configs[0]).launch(Request(tuple(given), configs))
    return _opened(configs)


def _run(configs: Sequence[RunConfig], callbacks: Sequence[Callback]) -> Run:
    """Run all stages; a signal ends them with what is done so far."""
    run_recipe(configs, callbacks)
    return _opened(configs)


def _opened(configs: Sequence[RunConfig]) -> Run:
    stages = [Run(config.output_dir) for config in configs]
    return stages[0] if len(stages) == 1 else Run(stages[-1].folder, stages)


def _resuming(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume=True))
