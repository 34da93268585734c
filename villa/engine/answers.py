"""A model's answers to examples, with or without known targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from villa.batch import Batch
from villa.datasets.base import Split, TaskDataset, top_answers
from villa.engine.evaluator import Ran
from villa.engine.setup import Parts
from villa.evaluation.metrics import MeanScore
from villa.evaluation.predictions import PredictionWriter
from villa.facts import Written
from villa.progress import track
from villa.registry import SUBMISSIONS

#: Answers of an example that a prediction lists, best first.
_BEST = 5


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

    Besides what ``TaskDataset.decode`` returns, they have as far as it is known: ``question``, ``gold`` (the right
    answer, or the score of every right one), the ``correct`` share by the metric, and ``top``, the best answers.

    Args:
        parts: the model, its data and the processes.
        examples: the split.
        metric: has scored every batch before it comes here; None if nothing is scored.
    """

    def __init__(self, parts: Parts, examples: Split, metric: MeanScore | None = None) -> None:
        self._parts, self._examples, self._metric = parts, examples, metric
        self._order = InOrder(parts.evaluation_plan(examples))
        facts = parts.data.facts()
        written = len(examples) and examples.shown_text(0) is not None
        self._tokens, self._labels = None if written else facts.tokens, facts.labels
        self._done = 0

    def __call__(self, ran: Ran) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the ids and decoded answers that are next, given this process's batch; a collective call."""
        decoded = self._decoded(ran)
        mine = [ran.batch.ids, decoded] if ran.own else [[], []]
        gathered = self._parts.strategy.processes.gather(mine)
        ids, answers = self._order.add(
            *([one for part in parts for one in part] for parts in zip(*gathered, strict=True))
        )
        first, self._done = self._done, self._done + len(ids)
        if not self._parts.strategy.processes.is_main:
            return ids, answers
        texts = [self._examples.shown_text(index) for index in range(first, self._done)]
        return ids, [{"question": t, **a} if t is not None else a for t, a in zip(texts, answers, strict=True)]

    def _decoded(self, ran: Ran) -> list[dict[str, Any]]:
        found = self._answers(ran)
        more = self._questions(ran.batch), self._gold(ran.batch), self._correct(ran)
        if any(len(part) not in (0, len(found)) for part in more):
            return found
        empty: list[dict[str, Any]] = [{}] * len(found)
        columns = zip(*(part or empty for part in more), found, strict=True)
        return [{name: value for values in row for name, value in values.items()} for row in columns]

    def _answers(self, ran: Ran) -> list[dict[str, Any]]:
        predictions = self._parts.evaluator.predictions(ran.batch, ran.output)
        if isinstance(predictions, Written):
            return self._parts.data.decode_written(predictions, ran.batch)
        ranked = self._parts.data.rank(predictions)
        return self._parts.data.decode(predictions, ran.batch) if ranked is None else top_answers(*ranked, _BEST)

    def _questions(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the words of the texts, by tokens that are known."""
        if self._tokens is None or batch.input_ids is None or batch.input_ids.dim() != 2:
            return []
        masks = batch.input_ids > -1 if batch.attention_mask is None else batch.attention_mask
        rows = zip(batch.input_ids.tolist(), masks.tolist(), strict=True)
        return [{"question": _words([self._tokens[i] for i, real in zip(*row, strict=True) if real])} for row in rows]

    def _gold(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the right answers, for targets among the labels."""
        targets, labels = batch.targets, self._labels
        if targets is None or labels is None or len(targets) != len(batch) or batch.objective is not None:
            return []
        if not targets.is_floating_point():
            return [{"gold": labels[i]} for i in targets.tolist()] if targets.dim() == 1 else []
        if targets.shape[1:] != (len(labels),):
            return []
        rows = [[(i, row[i].item()) for i in row.nonzero().flatten().tolist()] for row in targets.cpu()]
        return [{"gold": {labels[i]: round(score, 6) for i, score in row}} for row in rows]

    def _correct(self, ran: Ran) -> list[dict[str, Any]]:
        """Return the score of every example by the metric."""
        if self._metric is None or not ran.own:
            return []
        return [{"correct": round(float(score), 6)} for score in self._metric.take()]


def _words(tokens: Sequence[str | None]) -> str:
    """Return the text of word-pieces, without special tokens."""
    known = [token for token in tokens if token is not None and not (token[:1] == "[" and token[-1:] == "]")]
    return " ".join(known).replace(" ##", "")


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
