"""A model's answers to examples, with or without known targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from villa.datasets.base import Split, TaskDataset
from villa.engine.evaluator import Ran
from villa.engine.setup import Parts
from villa.evaluation.predictions import PredictionWriter
from villa.progress import track
from villa.registry import SUBMISSIONS


class InOrder:
    """Puts the answers to a split's batches in the order of the split.

    Answers wait for those before them, for the batches of ``Parts.evaluation_plan`` are sorted by length.

    Args:
        plan: the examples of every batch.
    """

    def __init__(self, plan: Sequence[Sequence[int]]) -> None:
        self._indices = chain.from_iterable(plan)
        self._waiting: dict[int, tuple[str, dict[str, Any]]] = {}
        self._next = 0

    def add(self, ids: list[str], answers: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the ids and answers that are next, given those of the next batch of the plan."""
        for answer in zip(ids, answers, strict=True):
            self._waiting[next(self._indices)] = answer
        ready = []
        while self._next in self._waiting:
            ready.append(self._waiting.pop(self._next))
            self._next += 1
        return [id_ for id_, _ in ready], [answer for _, answer in ready]


class Collector:
    """Gathers the answers to a split's batches from all processes, in the order of the split.

    Args:
        parts: the model, its data and the processes.
        examples: the split.
    """

    def __init__(self, parts: Parts, examples: Split) -> None:
        self._parts = parts
        self._order = InOrder(parts.evaluation_plan(examples))

    def __call__(self, ran: Ran) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the ids and decoded answers that are next, given this process's batch; a collective call."""
        decoded = self._parts.decode(ran.batch, ran.output)
        mine = [ran.batch.ids, decoded] if ran.own else [[], []]
        gathered = self._parts.strategy.processes.gather(mine)
        return self._order.add(*([one for part in parts for one in part] for parts in zip(*gathered, strict=True)))


def answers(parts: Parts, examples: Split) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yield the ids and decoded answers of the examples, in order."""
    batches, count = parts.evaluation_batches(examples)
    collect = Collector(parts, examples)
    for ran in parts.evaluator.predict(track(batches, "predict", count, mode=parts.config.logging.progress)):
        yield collect(ran)


def write_answers(parts: Parts, examples: Split, path: Path) -> None:
    """Write the answers to a prediction file.

    Raises:
        OSError: the file cannot be written.
    """
    with answer_file(parts, path) as write:
        for ids, decoded in answers(parts, examples):
            write(ids, decoded)


@contextmanager
def answer_file(parts: Parts, path: Path) -> Iterator[Callable[[list[str], list[dict[str, Any]]], None]]:
    """Open a prediction file and yield a function that writes ids and answers to it; a no-op above rank 0."""
    if not parts.strategy.processes.is_main:
        yield lambda ids, decoded: None
        return
    with PredictionWriter(path) as writer:
        yield writer.write


def submission_path(data: TaskDataset, split: str, folder: Path) -> Path | None:
    """Return the path of a split's submission file, or None if the split has none."""
    name = data.submission(split)
    return None if name is None else folder / f"submission_{split}{SUBMISSIONS.get(name).suffix}"


def write_submission(data: TaskDataset, split: str, predictions: Path) -> Path | None:
    """Convert a split's prediction file into a submission file beside it; return its path, or None if it has none.

    Raises:
        DataError: the predictions do not make a valid submission.
    """
    path = submission_path(data, split, predictions.parent)
    if path is not None:
        SUBMISSIONS.get(str(data.submission(split)))().write(predictions, path)
    return path
