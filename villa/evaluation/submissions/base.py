"""What a submission format owes its user, and the common part of formats with one entry an example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from villa.engine.progress import track
from villa.errors import DataError, StorageError
from villa.evaluation.predictions import read_predictions
from villa.evaluation.submissions.ids import IdCheck
from villa.files import replacing
from villa.plugins import one_line

E = TypeVar("E")


@dataclass(frozen=True)
class Report:
    """What a validator found in a valid file.

    Attributes:
        task: name of the format.
        entries: number of examples.
        compared: whether the ids were compared with a list.
        detail: more counts, for the user.
    """

    task: str
    entries: int
    compared: bool
    detail: str = ""

    def __str__(self) -> str:
        notes = [self.detail, "" if self.compared else "ids checked for form and uniqueness only"]
        note = "; ".join(filter(None, notes))
        return f"{self.entries:,} entries, valid {self.task} submission" + (f" ({note})" if note else "")


class Submission(ABC):
    """A format of submission files. ``@register_submission(name)`` registers a subclass.

    Attributes:
        name: the name under which it is registered.
        suffix: ending of the file's name, with the dot.
        description: the form of the file in a few words, for messages.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    description: ClassVar[str]

    @abstractmethod
    def write(self, predictions: Path, output: Path) -> int:
        """Turn a prediction file into a submission file; it appears under its name when it is complete and valid.

        Args:
            predictions: JSON lines, see ``villa.evaluation.predictions``.
            output: file to write; missing folders are made.

        Returns:
            The number of entries.

        Raises:
            DataError: the predictions are not of the form that the format needs, or the file cannot be written.
        """

    @abstractmethod
    def validate(self, file: Path, ids: Collection[str] | None = None) -> Report:
        """Check a file.

        Args:
            file: the file, of any origin.
            ids: ids of the split, all of which must occur and no others; None checks form and uniqueness alone.

        Raises:
            DataError: the first problem, with its place in the file.
        """

    def check_suffix(self, file: Path) -> None:
        """Check the ending of a file's name.

        Raises:
            DataError: it is another one.
        """
        if file.suffix != self.suffix:
            raise DataError(f"'{file}' must end in {self.suffix}; a {self.name} submission is a {self.description}")


class EntrySubmission(Submission, Generic[E]):
    """A text file with one entry an example, written and checked as a stream; memory grows with the ids only."""

    @abstractmethod
    def convert(self, record: Mapping[str, Any], where: str) -> E:
        """Make an entry of a prediction.

        Raises:
            DataError: the prediction lacks what the entry needs; ``where`` is its place.
        """

    @abstractmethod
    def check(self, entry: E, where: str) -> str:
        """Check an entry and return its id.

        Raises:
            DataError: the entry is not of the format; ``where`` is its place.
        """

    @abstractmethod
    def read(self, file: Path) -> Iterator[tuple[str, E]]:
        """Yield the entries of a file, each with its place for messages.

        Raises:
            DataError: the file cannot be read or is of another form.
        """

    @abstractmethod
    def encode(self, entries: Iterator[E]) -> Iterator[str]:
        """Yield the text of a file with these entries, in pieces."""

    def write(self, predictions: Path, output: Path) -> int:
        """Convert, check and write one entry after the other."""
        self.check_suffix(output)
        ids = IdCheck(None)
        try:
            with replacing(output) as temporary:
                with temporary.open("x", encoding="utf-8", newline="") as file:
                    file.writelines(self.encode(self._converted(predictions, ids)))
                ids.finish(predictions)
        except StorageError:
            raise
        except OSError as error:
            raise DataError(f"cannot turn '{predictions}' into '{output}' ({one_line(error)}); check both") from error
        return len(ids)

    def validate(self, file: Path, ids: Collection[str] | None = None) -> Report:
        """Read and check one entry after the other."""
        self.check_suffix(file)
        check = IdCheck(ids)
        for where, entry in self.read(file):
            check.add(self.check(entry, where), where)
        check.finish(file)
        return Report(self.name, len(check), compared=ids is not None)

    def _converted(self, predictions: Path, ids: IdCheck) -> Iterator[E]:
        for number, record in enumerate(track(read_predictions(predictions), "write"), start=1):
            where = f"{predictions} line {number}"
            entry = self.convert(record, where)
            ids.add(self.check(entry, where), where)
            yield entry
