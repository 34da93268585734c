"""Signatures of extractors beside the features that they made, so that features of different ones are not mixed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from villa.errors import DataError, reading
from villa.files import write_json
from villa.json_values import read_own

#: Form of a signature: network, version of its package, its weights, and options.
_SIGNATURE = re.compile(r"(?P<network>\S+) \S+ (?P<weights>[0-9a-f]{16}) (?P<options>.+)")
#: Name of the note in a folder of features, and what it appends to the name of a file of features.
NOTE = "extractor.json"


def note_of(place: Path) -> Path:
    """Return the path of the note about a folder or file of features."""
    return place.with_name(f"{place.name}.{NOTE}") if place.suffix == ".tsv" else place / NOTE


def write_signature(place: Path, signature: str, facts: Mapping[str, Any]) -> None:
    """Note which extractor made the features in ``place``, with other ``facts`` about them."""
    write_json(note_of(place), {**facts, "extractor": signature})


def read_signature(place: Path) -> str | None:
    """Return the signature of the extractor that made the features in ``place``; None if nobody noted it.

    Raises:
        DataError: the note is damaged.
    """
    note = _read_note(place)
    return None if note is None else str(note["extractor"])


def read_maker(place: Path) -> dict[str, Any] | None:
    """Return how the extractor that made the features in ``place`` was built, if known: its ``name`` and options.

    Raises:
        DataError: the note is damaged.
    """
    maker = (_read_note(place) or {}).get("maker")
    return maker if is_maker(maker) else None


def is_signature(value: Any) -> bool:
    """Return whether a value has the form of a signature: a text of one line."""
    return isinstance(value, str) and value.isprintable()


def is_maker(value: Any) -> bool:
    """Return whether a value has the form of what ``read_maker`` returns."""
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _read_note(place: Path) -> dict[str, Any] | None:
    file = note_of(place)
    if not file.is_file():
        return None
    with reading(f"the note on the features' extractor, '{file}', cannot be read", "extract them again, or remove it"):
        note = read_own(file)
        if not isinstance(note, dict) or not is_signature(note["extractor"]):
            raise ValueError("it names no extractor")
        return note


def extractor_reading(signature: str | None) -> dict[str, str]:
    """Return, for ``DataFacts.reading``, which network made the features, and how it read the images."""
    made = _SIGNATURE.fullmatch(signature or "")
    if made is None:
        return {}
    return {"feature extractor": f"{made['network']} {made['weights']}", "grid features": made["options"]}


def check_signatures(made: Iterable[tuple[str | Path, str | None]]) -> str | None:
    """Check that features are of one extractor, as far as it is known, and return its signature.

    Args:
        made: where features are, and the signature of what made them.

    Raises:
        DataError: naming the first two places with different ones.
    """
    known = [(where, signature) for where, signature in made if signature is not None]
    for where, signature in known[1:]:
        if signature != known[0][1]:
            raise DataError(
                f"these features are of another detector: '{where}' has those of '{signature}', '{known[0][0]}' those "
                f"of '{known[0][1]}'; extract both with one"
            )
    return known[0][1] if known else None


def check_trained(trained: Mapping[str, Any], reading: Mapping[str, str], data: Path) -> None:
    """Check features against those that a checkpoint was trained on, as far as both are known.

    Args:
        trained: facts that the checkpoint kept.
        reading: ``DataFacts.reading`` of the data.
        data: the data, for the message.

    Raises:
        DataError: another extractor made them.
    """
    before = trained.get("reading")
    before = before if isinstance(before, Mapping) else {}
    before = {name: made for name, made in before.items() if is_signature(made)}
    for fact in ("feature extractor", "grid features"):
        if None not in (before.get(fact), reading.get(fact)) and before[fact] != reading[fact]:
            raise DataError(
                f"these features are of another detector: the checkpoint was trained on those of '{before[fact]}', "
                f"'{data}' has those of '{reading[fact]}'; extract both with one"
            )
