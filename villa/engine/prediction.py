"""``run_type=predict``: predictions for a split or for the user's own images and records, resumed after a kill."""

from __future__ import annotations

import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any

from villa.config.schema import RunConfig
from villa.distributed.strategy import strategy_of
from villa.engine.answering import Answered, Answering, decode
from villa.engine.answers import InOrder, submission_path
from villa.engine.inference import restore_parts
from villa.engine.journal import Journal, facts_of_model, open_journal
from villa.engine.reading import RequestReader
from villa.engine.requests import open_requests
from villa.engine.setup import Parts
from villa.errors import ConfigError, StorageError, one_line
from villa.evaluation.predictions import PredictionWriter
from villa.files import atomic_write
from villa.hub.source import Source
from villa.progress import Display
from villa.registry import SUBMISSIONS

#: Options that change predictions.
_SKIP = " (predict.on_error=skip leaves such examples out)"
_OPTIONS = ("split", "question", "top_k", "examples", "extractor")


def predict(config: RunConfig) -> int:
    """Write predictions for a split, or for the images or records of ``predict.input``.

    What a killed process has left is gone on with; the file is the same to the byte.
    """
    given = config.predict.input
    processes = strategy_of(config.distributed).connect()
    stem = config.predict.split if given is None else Path(given).resolve().stem
    output = Path(config.predict.output or Path(config.output_dir) / f"predictions_{stem}.jsonl")
    if output.exists():
        raise ConfigError(f"'{output}' exists; move it away or give another predict.output")
    processes.barrier()  # every process has checked before the file is created
    parts, source = restore_parts(config)
    parts.distribute()
    submission = submission_path(parts.data, config.predict.split, output.parent) if given is None else None
    if submission is not None and submission.exists():
        raise ConfigError(f"'{submission}' exists; move it away or give another predict.output")
    work = _SplitWork(parts) if given is None else _InputWork(parts, given)
    for note in work.notes:
        print(f"note: {stem}: {note}")
    try:
        _write(parts, work, output, submission, _job(config, source, work))
    except StorageError:
        raise
    except OSError as error:
        raise ConfigError(f"'{output}' cannot be written: {one_line(error)}; give another predict.output") from error
    return 0


class _Work(ABC):
    """What is predicted on.

    Attributes:
        count: number of examples.
        digest: what changes if the examples or their order do.
        notes: what the user should know about them.
    """

    count: int
    digest: str
    notes: list[str]

    @abstractmethod
    def batches(self, first: int) -> Iterator[Answered]:
        """Yield the answers of batch after batch, beginning with number ``first``; a collective call."""

    def ordered(self, journal: Iterable[Answered]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
        """Yield ids and answers in the order of the examples."""
        return ((batch.ids, batch.answers) for batch in journal)


class _InputWork(_Work):
    """The images or records of ``predict.input``."""

    def __init__(self, parts: Parts, place: str) -> None:
        options = parts.config.predict
        reader = RequestReader(parts, options.extractor)
        self._requests = open_requests(place, reader.input_options(parts.config))
        self.notes = reader.check(self._requests)
        self.count, self.digest = len(self._requests), self._requests.digest()
        self._answering = Answering(parts, reader, options, _SKIP)

    def batches(self, first: int) -> Iterator[Answered]:
        """Yield the answers of batch after batch."""
        return self._answering(self._requests, first)


class _SplitWork(_Work):
    """A split, in the batches of ``Parts.evaluation_plan``."""

    def __init__(self, parts: Parts) -> None:
        name = parts.config.predict.split
        self._parts, self._split = parts, parts.split(name, "predict.split")
        self.notes, self.count = self._split.warnings(), len(self._split)
        self.digest = f"{name} {self.count}"

    def batches(self, first: int) -> Iterator[Answered]:
        """Yield the answers of batch after batch, whose examples are of similar length."""
        batches, _ = self._parts.evaluation_batches(self._split, start=first)
        for ran in self._parts.evaluator.predict(batches):
            mine = [ran.batch.ids, decode(self._parts, ran, self._parts.config.predict.top_k)] if ran.own else None
            for values in self._parts.strategy.processes.gather(mine):
                if values is not None:
                    yield Answered(*values)

    def ordered(self, journal: Iterable[Answered]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
        """Yield ids and answers in the order of the split; few wait for those before them."""
        order = InOrder(self._parts.evaluation_plan(self._split))
        return (order.add(batch.ids, batch.answers) for batch in journal)


def _write(parts: Parts, work: _Work, output: Path, submission: Path | None, job: Mapping[str, Any]) -> None:
    """Predict what the journal lacks, and write the output from it."""
    processes = parts.strategy.processes
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(output, job)) if processes.is_main else None
        first = processes.largest(0 if journal is None else journal.done)
        for batch in _shown(parts, work, first, journal):
            if journal is not None:
                journal.add(list(astuple(batch)))
        if journal is not None:
            _finish(parts, work, journal, output, submission)


def _shown(parts: Parts, work: _Work, first: int, journal: Journal | None) -> Iterator[Answered]:
    """Yield the answers of batch after batch, and show how far they have come, how fast, and the time left."""
    done = sum(map(_size, map(_read, journal))) if journal is not None and first else 0
    display = Display(parts.config.logging.progress)
    if done:
        display.say(f"going on after {done:,} of {work.count:,} predictions")
    task, made, begun = display.add("predict", work.count, done), 0, time.perf_counter()
    try:
        for batch in work.batches(first):
            yield batch
            made += _size(batch)
            display.show(task, done + made, f"{made / (time.perf_counter() - begun):,.1f} examples/s")
    finally:
        display.stop()


def _finish(parts: Parts, work: _Work, journal: Journal, output: Path, submission: Path | None) -> None:
    """Write the output, the list of skipped examples and the submission file, and say so."""
    skipped = [f"{json.dumps({'id': id_, 'reason': why}, ensure_ascii=False)}\n" for b in journal for id_, why in b[2]]
    listed = output.with_name(f"{output.stem}.skipped.jsonl")
    if skipped:
        atomic_write(listed, "".join(skipped))
    written = _copy(work, journal, output)
    left_out = f"; {len(skipped):,} examples were skipped ('{listed}' says why)" if skipped else ""
    print(f"{written} predictions written to {output}{left_out}")
    if submission is None:
        return
    with tempfile.TemporaryDirectory(prefix="villa_") as folder:
        lines = Path(folder) / "predictions.jsonl"
        _copy(work, journal, lines)
        SUBMISSIONS.get(str(parts.data.submission(parts.config.predict.split)))().write(lines, submission)
    print(f"submission file written to {submission}")


def _copy(work: _Work, journal: Journal, output: Path) -> int:
    """Write a prediction file from the journal; return the number of predictions."""
    written = 0
    with PredictionWriter(output) as writer:
        for ids, answers in work.ordered(map(_read, journal)):
            writer.write(ids, answers)
            written += len(ids)
    return written


def _job(config: RunConfig, source: Source, work: _Work) -> dict[str, Any]:
    """Return what the predictions depend on."""
    return {
        "predict.input": work.digest,
        **facts_of_model(config, source, "evaluation.examples"),
        **{f"predict.{name}": getattr(config.predict, name) for name in _OPTIONS},
    }


def _read(line: Any) -> Answered:
    return Answered(*line)


def _size(batch: Answered) -> int:
    return len(batch.ids) + len(batch.skipped)
