"""The score of every test example in the runs of a study, from the predictions that the runs have left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from villa.analysis.differences import Scores
from villa.batch import Batch
from villa.checkpoints.layout import METRICS
from villa.config.schema import RunConfig
from villa.datasets.base import Split, TaskDataset
from villa.errors import ConfigError, DataError
from villa.evaluation.metrics import TargetScore
from villa.evaluation.predictions import read_predictions
from villa.evaluation.results import read_metrics
from villa.registry import DATASETS
from villa.registry import METRICS as KINDS
from villa.studies.cells import Cells, Row

#: Examples that are read at once.
_AT_ONCE = 256
#: Examples whose two best answers may be equally probable but for rounding: predictions then name the other one.
_TIES = 2


@dataclass(frozen=True)
class _Key:
    """What test examples a run has: by id, the score of every answer.

    Attributes:
        metric: name of the score.
        labels: index of an answer.
        scores: by id, the score of each label.
    """

    metric: str
    labels: Mapping[str, int]
    scores: Mapping[str, torch.Tensor]


class ExampleScores:
    """Scores of test examples.

    Args:
        cells: the runs, all of which have ended.
    """

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._keys: dict[str, _Key] = {}
        self._found: dict[Row, dict[int, dict[str, float]]] = {}

    def of(self, row: Row) -> Scores:
        """Return the scores of a row's runs by seed and example.

        Raises:
            ConfigError: the task's examples have no answers of a fixed list.
            DataError: the predictions are not those that the run has scored.
        """
        if row not in self._found:
            self._found[row] = {
                seed: self._scores(self._cells.configs(row, seed)[-1]) for seed in self._cells.recipe.seeds
            }
        return self._found[row]

    def metric(self, row: Row) -> str:
        """Return the name of the score."""
        return _metric(self._cells.configs(row, self._cells.recipe.seeds[0])[-1])[0]

    def _scores(self, config: RunConfig) -> dict[str, float]:
        folder, split = Path(config.output_dir), config.evaluation.test_split
        name = repr((config.dataset, split))
        if name not in self._keys:
            self._keys[name] = _key(config)
        key = self._keys[name]
        found = {}
        for record in read_predictions(folder / f"predictions_{split}.jsonl"):
            label, scores = key.labels.get(str(record["answer"])), key.scores.get(record["id"])
            if label is None or scores is None:
                raise DataError(f"'{folder}' predicts {record['answer']!r:.40} for '{record['id']}': not of this data")
            found[record["id"]] = float(scores[label])
        reached = read_metrics(folder / METRICS, "remove its folder to run it again")[split][key.metric]
        mean = sum(found.values()) / max(len(found), 1)
        if abs(mean - reached) * len(found) > _TIES or found.keys() != key.scores.keys():
            raise DataError(f"'{folder}' reached {reached:.6f}, but its predictions score {mean:.6f}; remove it")
        return found


def _metric(config: RunConfig) -> tuple[str, TargetScore]:
    for name in config.evaluation.metrics:
        kind = KINDS.get(name)
        if issubclass(kind, TargetScore):
            return name, kind()
    raise ConfigError("a study compares answers of a fixed list: evaluation.metrics needs accuracy or soft_accuracy")


def _key(config: RunConfig) -> _Key:
    name, metric = _metric(config)
    data: TaskDataset = DATASETS.get(config.dataset.name)(config.dataset)
    split, count = data.split(config.evaluation.test_split), data.facts().num_labels
    if not count:
        raise ConfigError(f"a study compares answers of a fixed list, which dataset '{config.dataset.name}' lacks")
    sure = torch.eye(count) * 100
    first = data.collate([split[0]])
    labels = {str(data.decode(row[None], first)[0]["answer"]): index for index, row in enumerate(sure)}
    scores: dict[str, torch.Tensor] = {}
    for batch in _batches(data, split):
        if batch.targets is None:
            raise ConfigError("a study needs a test split with answers: set evaluation.test_split")
        each = [metric.scores(row.expand(len(batch.ids), -1), batch.targets).double() for row in sure]
        scores |= dict(zip(batch.ids, torch.stack(each, dim=1), strict=True))
    return _Key(name, labels, scores)


def _batches(data: TaskDataset, split: Split) -> Iterator[Batch]:
    for start in range(0, len(split), _AT_ONCE):
        yield data.collate([split[index] for index in range(start, min(start + _AT_ONCE, len(split)))])
