"""Submission files beside prediction files, for data sets whose task has a leaderboard or a form of its own."""

from __future__ import annotations

from pathlib import Path

from villa.datasets.base import TaskDataset
from villa.registry import SUBMISSIONS


def submission_path(data: TaskDataset, split: str, folder: Path) -> Path | None:
    """Return where the submission file of a split goes; None where the split has none."""
    name = data.submission(split)
    return None if name is None else folder / f"submission_{split}{SUBMISSIONS.get(name).suffix}"


def write_submission(data: TaskDataset, split: str, predictions: Path) -> Path | None:
    """Turn a split's prediction file into a submission file beside it; return its path, or None where it has none.

    Raises:
        DataError: the predictions do not make a valid submission.
    """
    path = submission_path(data, split, predictions.parent)
    if path is not None:
        SUBMISSIONS.get(str(data.submission(split)))().write(predictions, path)
    return path
