"""The results of a run: ``metrics.json`` with its protocol, and a short table on the terminal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from villa.errors import ConfigError, nearest, reading
from villa.files import write_json
from villa.json_values import is_number, read_own
from villa.provenance import check_provenance
from villa.streams import drawable, visible
from villa.tracking import json_number

#: Failures that are kept.
_WORST = 40
#: Wider than any table, so that nothing is cut off when not printing to a terminal.
_PLAIN_WIDTH = 1000


@dataclass(frozen=True)
class EvaluationProtocol:
    """What a result depends on, so that it can be reproduced. It is independent of time.

    Attributes:
        data: ``TaskDataset.fingerprint()``.
        update: optimiser steps of the evaluated checkpoint.
        seed: the run's seed.
        provenance: software and its versions; see ``villa.provenance``.
        checkpoint: how the checkpoint was chosen (``best``, ``last``) or given.
        recipe: name of the recipe.
        method: name of the trainer.
        examples: number of examples by split.
        intervals: 95 % bootstrap interval over examples, by split and metric.
    """

    data: str
    update: int
    seed: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = "best"
    recipe: str = ""
    method: str = ""
    examples: Mapping[str, int] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)


def write_metrics(path: Path, splits: Mapping[str, Mapping[str, float]], protocol: EvaluationProtocol) -> None:
    """Write ``{"<split>": {"accuracy": ..., "loss": ...}, ..., "protocol": {...}}``, atomically.

    The same arguments give the same bytes. Values that are not finite are written as text, as in the logs.

    Args:
        path: the file, by convention ``metrics.json`` in the run's folder.
        splits: values by name, by split.
        protocol: what the values depend on.

    Raises:
        ConfigError: a split is called ``protocol``.
        OSError: the file cannot be written; an older one is intact.
    """
    if "protocol" in splits:
        raise ConfigError("a split is called 'protocol', which metrics.json reserves; rename the split")
    results = {name: {k: json_number(v) for k, v in values.items()} for name, values in splits.items()}
    write_json(path, {**results, "protocol": asdict(protocol)})


def read_metrics(path: Path, advice: str) -> dict[str, Any]:
    """Read a file of ``write_metrics``; the protocol, if there is one, is under ``protocol``.

    Args:
        path: the file.
        advice: what to do if it is damaged, for the message.

    Raises:
        DataError: it is missing or damaged.
    """
    with reading(f"'{path}' does not hold the results of a run", advice):
        found = read_own(path)
        protocol = found.get("protocol", {})
        check_provenance(protocol.get("provenance", {}))
        for split in found.keys() - {"protocol"}:
            for name, value in found[split].items():
                if not is_number(value) and not isinstance(value, str):
                    raise ValueError(f"'{name}' of '{split}' is {value!r:.40}")
    return dict(found)


@dataclass
class Tally:
    """What the predictions of a split add up to.

    Attributes:
        count: number of examples.
        correct: share of each that is right by the metric; empty if the metric is not a mean over examples.
        gold: sum over examples of the score of every right answer.
        worst: index, id and prediction of the examples that are most wrong: with most confidence.
    """

    count: int = 0
    correct: list[float] = field(default_factory=list)
    gold: Counter[str] = field(default_factory=Counter)
    worst: list[tuple[int, str, Mapping[str, Any]]] = field(default_factory=list)

    def add(self, ids: Sequence[str], predictions: Sequence[Mapping[str, Any]]) -> None:
        """Add the predictions that are next in the order of the split."""
        for id_, prediction in zip(ids, predictions, strict=True):
            gold = prediction.get("gold")
            self.gold.update({gold: 1.0} if isinstance(gold, str) else gold or {})
            if "correct" in prediction:
                self.correct.append(prediction["correct"])
                if prediction["correct"] < 1:
                    self.worst.append((self.count, id_, prediction))
            self.count += 1
        if len(self.worst) > 2 * _WORST:
            self._sort()

    def failures(self) -> list[tuple[int, str, Mapping[str, Any]]]:
        """Return the worst examples, the worst first."""
        self._sort()
        return self.worst

    def majority(self) -> float | None:
        """Return the score of the answer that is right most often, given to every example; None if it is not known."""
        return max(self.gold.values()) / self.count if self.gold else None

    def _sort(self) -> None:
        self.worst.sort(key=lambda item: (item[2]["correct"], -item[2].get("score", 0.0), item[0]))
        del self.worst[_WORST:]


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        method: name of the run or method.
        metrics: values in [0, 1] by name, and ``loss``.
        updates: optimiser steps completed.
        seconds: training time.
        cost: passes relative to standard training.
        interval: 95 % interval of the metric that is shown.
    """

    method: str
    metrics: Mapping[str, float]
    updates: int | None = None
    seconds: float | None = None
    cost: float | None = None
    interval: tuple[float, float] | None = None


def result_table(
    results: Sequence[Result],
    references: Mapping[str, float] | None = None,
    *,
    metric: str = "accuracy",
    title: str | None = None,
) -> Table:
    """Return a table of results, followed by the scores of trivial baselines for comparison.

    Args:
        results: one row each.
        references: scores in [0, 1] by name, as returned by ``TaskDataset.reference_scores``.
        metric: the value to show, in percent; ``loss`` shows the loss alone, without references.
        title: title of the table, for instance the split.

    Raises:
        ConfigError: a result has no value called ``metric``.
    """
    table = Table(title=_literal(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("method")
    score = [] if metric == "loss" else [f"{metric.replace('_', ' ')} %"]
    if score and any(result.interval for result in results):
        score.append("95 % interval")
    for heading in (*score, "loss", "updates", "minutes", "cost"):
        table.add_column(_literal(heading), justify="right")
    for result in results:
        table.add_row(*_cells(result, metric, interval=len(score) > 1))
    if references and score:
        table.add_section()
        for name, reference in sorted(references.items(), key=lambda item: -item[1]):
            table.add_row(_literal(name.replace("_", " ")), f"{100 * reference:.1f}", style="dim")
    return table


def print_results(
    results: Sequence[Result],
    references: Mapping[str, float] | None = None,
    *,
    metric: str = "accuracy",
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print ``result_table``; if not to a terminal, as Markdown at full width.

    Args:
        results: as for ``result_table``.
        references: as for ``result_table``.
        metric: as for ``result_table``.
        title: as for ``result_table``.
        console: where to print; standard output by default.

    Raises:
        ConfigError: a result has no value called ``metric``.
    """
    print_table(result_table(results, references, metric=metric, title=title), console)


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table; if not to a terminal, as Markdown at full width.

    Args:
        table: the table.
        console: where to print; standard output by default.
    """
    console = console or Console(file=drawable(sys.stdout))
    if not console.is_terminal:
        table.box = box.MARKDOWN
        console = Console(file=console.file, width=_PLAIN_WIDTH, force_terminal=False, color_system=None)
    console.print(table)


def _literal(text: str) -> Text:
    """Return a user's name without rich's markup and with control characters escaped."""
    return Text(visible(text))


def _cells(result: Result, metric: str, *, interval: bool) -> list[Text | str]:
    if metric not in result.metrics:
        known = ", ".join(result.metrics)
        hint = nearest(metric, result.metrics)
        raise ConfigError(f"result of '{result.method}' has no value '{metric}' (it has: {known}){hint}")
    loss = result.metrics.get("loss")
    score = [] if metric == "loss" else [f"{100 * result.metrics[metric]:.1f}"]
    if interval:
        score.append("[{:.1f}, {:.1f}]".format(*(100 * end for end in result.interval)) if result.interval else "")
    return [
        _literal(result.method),
        *score,
        "" if loss is None else f"{loss:.4f}",
        "" if result.updates is None else f"{result.updates:,}",
        "" if result.seconds is None else f"{result.seconds / 60:.1f}",
        "" if result.cost is None else f"{result.cost:.1f}x",
    ]
