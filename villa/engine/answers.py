"""A model's answers to examples, with or without known targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from villa.datasets.base import Split, TaskDataset
from villa.engine.evaluator import Ran
from villa.engine.setup import Parts
from villa.evaluation.predictions import PredictionWriter
from villa.progress import track
from villa.registry import SUBMISSIONS


def answers(parts: Parts, examples: Split) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yield the ids and decoded answers of the examples, in order; only rank 0 gets them."""
    batches, count = parts.evaluation_batches(examples)
    for ran in parts.evaluator.predict(track(batches, "predict", count, mode=parts.config.logging.progress)):
        yield from collected(parts, ran)


def collected(parts: Parts, ran: Ran) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Gather the ids and decoded answers of a batch from all ranks, in the order of the split; a collective call."""
    decoded = parts.decode(ran.batch, ran.output)
    mine = [ran.batch.ids, decoded] if ran.own else [[], []]
    yield from map(tuple, parts.strategy.processes.gather(mine))


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
