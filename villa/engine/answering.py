"""A model's answers to records, in batches that do not depend on the number of processes, nor on where a run starts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from typing import Any

from villa.batch import Batch
from villa.config.schema import PredictConfig
from villa.datasets.base import Example, top_answers
from villa.datasets.own.records import Request
from villa.engine.evaluator import Ran
from villa.engine.reading import RequestReader
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError
from villa.facts import Written


@dataclass
class Answered:
    """The answers to the records of a batch.

    Attributes:
        ids: ids of the records with answers.
        answers: their answers.
        skipped: id of every other record, and why it has none.
        error: why the prediction ends here, or None.
    """

    ids: list[str] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)
    error: str | None = None


class Answering:
    """Answers records: threads read them ahead of the model.

    Args:
        parts: the model and its data, shared by the processes of the run.
        reader: reads the records.
        options: size of a batch, number of threads, number of answers, and what to do about unusable records.
        advice: what ends the message about an unusable record.
    """

    def __init__(self, parts: Parts, reader: RequestReader, options: PredictConfig, advice: str = "") -> None:
        self._parts, self._reader, self._options, self._advice = parts, reader, options, advice
        self._last: Batch | None = None

    def __call__(self, requests: Sequence[Request], first: int = 0) -> Iterator[Answered]:
        """Yield the answers to batch after batch, in order; a collective call.

        Args:
            requests: the records.
            first: number of the batch to begin with.

        Raises:
            DataError: a record cannot be used, and is not to be skipped.
        """
        processes, count = self._parts.strategy.processes, math.ceil(len(requests) / self._options.examples)
        mine = range(first + processes.rank, count, processes.world_size)
        with ThreadPoolExecutor(self._options.workers) as pool:
            try:
                read = self._ahead(pool, requests, mine)
                for number in range(first, count, processes.world_size):
                    own = number + processes.rank < count
                    if own:
                        found = self._answer(*next(read))
                    else:
                        self._stand_in(requests)
                    for values in processes.gather(list(astuple(found)) if own else None):
                        if values is not None:
                            yield _raise_if_error(Answered(*values))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ahead(
        self, pool: ThreadPoolExecutor, requests: Sequence[Request], mine: Sequence[int]
    ) -> Iterator[tuple[list[Request], list[Any]]]:
        """Yield the records of this process's batches, and what was read of them, a few of them ahead of time."""
        size = self._options.examples
        places = (place for batch in mine for place in range(batch * size, min((batch + 1) * size, len(requests))))
        ahead: deque[tuple[Request, Future[Any]]] = deque()

        def more(wanted: int) -> None:
            while len(ahead) < wanted and (place := next(places, None)) is not None:
                request = requests[place]
                ahead.append((request, pool.submit(self._reader.read, request)))

        for batch in mine:
            given, read = [], []
            for _ in range(min(size, len(requests) - batch * size)):
                more(2 * self._options.workers)
                request, future = ahead.popleft()
                given.append(request)
                read.append(future.result())
            more(2 * self._options.workers)
            yield given, read

    def _answer(self, requests: list[Request], read: list[Any]) -> Answered:
        """Return the answers to a batch; without any usable record, another batch runs in its place."""
        found, good = Answered(), []
        for request, made in zip(requests, self._reader.examples(read), strict=True):
            if not isinstance(made, DataError):
                good.append(made)
            elif self._options.on_error == "stop":
                return Answered(error=f"{made}{self._advice}")
            else:
                found.skipped.append([request["id"], str(made)])
        try:
            batch = self._collated(good, found)
        except DataError as error:
            return Answered(error=str(error))
        if batch is None:
            self._stand_in(requests)
            return found
        self._last = batch
        (ran,) = self._parts.evaluator.predict([batch])
        found.ids, found.answers = ran.batch.ids, decode(self._parts, ran, self._options.top_k)
        return found

    def _collated(self, examples: list[Example], found: Answered) -> Batch | None:
        """Collate examples, perhaps without those that the model's own processor cannot read."""
        if not examples:
            return None
        collate = self._parts.data.collate
        try:
            return collate(examples)
        except DataError:
            if self._options.on_error == "stop":
                raise
        usable = []
        for example in examples:
            try:
                collate([example])
                usable.append(example)
            except DataError as error:
                found.skipped.append([example.id, str(error)])
        if len(usable) == len(examples):  # they do not go together
            return collate(examples)
        return collate(usable) if usable else None

    def _stand_in(self, requests: Sequence[Request]) -> None:
        """Run a batch that does not count, to keep the collective calls of a sharded model aligned."""
        if self._parts.strategy.processes.world_size == 1:
            return
        place = 0
        while self._last is None and place < len(requests):
            (made,) = self._reader.examples([self._reader.read(requests[place])])
            self._last = None if isinstance(made, DataError) else self._parts.data.collate([made])
            place += 1
        for _ in self._parts.evaluator.predict([] if self._last is None else [self._last]):
            pass


def decode(parts: Parts, ran: Ran, most: int = 1) -> list[dict[str, Any]]:
    """Decode a batch's answers; with ``most`` above 1, the best of each are in ``top``.

    Raises:
        ConfigError: the model does not rank answers.
    """
    if most == 1:
        return parts.decode(ran.batch, ran.output)
    predictions = parts.evaluator.predictions(ran.batch, ran.output)
    ranked = None if isinstance(predictions, Written) else parts.data.rank(predictions)
    if ranked is None:
        raise ConfigError(
            f"top_k={most} has no effect: '{parts.config.dataset.name}' has one answer an example here; leave it out"
        )
    return top_answers(*ranked, most)


def _raise_if_error(answered: Answered) -> Answered:
    if answered.error is not None:
        raise DataError(answered.error)
    return answered
