"""Columns of a user's data, taken as the fields of our records."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

from villa.datasets.stores import Piece
from villa.errors import ConfigError, DataError, nearest
from villa.json_values import parse_json

#: Field of images as text in base64.
BASE64 = "image_base64"
_IMAGES = ("image", "images", "features", BASE64)
_TEXTS, _ANSWERS = ("question", "text"), ("answer", "answers")
#: Fields of a record that a column can be taken for.
FIELDS = ("id", *_TEXTS, "text_pair", *_ANSWERS, *_IMAGES, "group", "subsets")
#: Fields that are left out where they are empty; any other must not be.
_OPTIONAL = {*_ANSWERS, "text_pair", "group", "subsets"}
#: Fields that hold lists or mappings, in JSON where the cells of a table are text.
_NESTED = {"answers", "images", "subsets"}
#: Name of the answer in the structures that some data sets list for each of its annotators.
_ANSWER = "answer"


def check_columns(columns: Mapping[str, Any]) -> None:
    """Refuse columns that name no field.

    Raises:
        ConfigError: naming the field.
    """
    for field, column in columns.items():
        if field not in FIELDS:
            raise ConfigError(
                f"dataset.columns names no field '{field}'{nearest(field, FIELDS)} (known: {', '.join(FIELDS)})"
            )
        if not isinstance(column, str):
            raise ConfigError(f"dataset.columns.{field} = {column!r:.40}: must be the name of a column, in quotes")


class Columns:
    """The choice of columns.

    Args:
        given: column by field; other fields are those of columns of their name.
        question: question of records without one.
        images: whether images are read.
    """

    def __init__(self, given: Mapping[str, str], question: str | None = None, *, images: bool = True) -> None:
        check_columns(given)
        self.given, self.question, self.images = dict(given), question, images
        skipped = () if images else _IMAGES
        instead = [names for names in (_TEXTS, _ANSWERS, _IMAGES) if any(name in given for name in names)]
        self._own = [field for field in FIELDS if field not in (*given, *chain(*instead), *skipped)]
        self._else: dict[str, str] = {}
        self._given = {field: column for field, column in given.items() if field not in skipped}

    def also(self, field: str, column: str) -> Columns:
        """Return the choice that takes a field from a column, if none is given for it and there is none of its name."""
        made = Columns(self.given, self.question, images=self.images)
        made._else = {field: column} if field in self._own else {}
        return made

    def among(self, names: Sequence[str]) -> dict[str, str]:
        """Return column by field, for those that a table with these columns has.

        Raises:
            DataError: a column is missing, or there are two of its name.
        """
        for field, column in self._given.items():
            if column not in names:
                raise DataError(f"there is no column '{column}' ({field}){nearest(column, names)} ({_listed(names)})")
        found = {**self._given, **self._named(names)}
        if self.question is None and not any(field in found for field in _TEXTS):
            raise DataError(
                f"there is no column 'question' or 'text' ({_listed(names)}); name it by dataset.columns.question, or "
                "give one question for all by dataset.question"
            )
        for field, column in found.items():
            if names.count(column) > 1:
                raise DataError(f"there are {names.count(column)} columns '{column}' ({field}); rename all but one")
        return found

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a record without fixed columns.

        Raises:
            DataError: a column is missing.
        """
        for field, column in self._given.items():
            if column not in values:
                raise DataError(f"'{column}' ({field}) is missing ({_listed([*values])})")
        fields = {field: values[column] for field, column in self._given.items()}
        return fields | {field: values[column] for field, column in self._named(values).items()}

    def _named(self, names: Collection[str]) -> dict[str, str]:
        """Return column by field, for fields that no column is given for."""
        found = {field: field for field in self._own if field in names}
        return found | {field: name for field, name in self._else.items() if field not in found and name in names}

    def record(self, fields: Mapping[str, Any], *, written: bool = False) -> dict[str, Any]:
        """Return the record of a row.

        Args:
            fields: its values by field, as they are in a table or JSON.
            written: all values are text, an empty one is none, and lists and mappings are in JSON.

        Raises:
            DataError: a value cannot be used.
        """
        record: dict[str, Any] = {}
        for field, value in fields.items():
            if field in _OPTIONAL and (value is None or (written and value == "")):
                continue
            if field == BASE64:
                record["image"] = None if value is None else _decoded(value)
            elif field in _NESTED:
                record[field] = _nested(field, _parsed(field, value) if isinstance(value, str) else value)
            else:
                record[field] = _image(value) if field == "image" else _plain(field, value)
        if self.question is not None and not any(field in record for field in _TEXTS):
            record["question"] = self.question
        return record


def _listed(names: Collection[str]) -> str:
    return f"there are: {', '.join(map(repr, names))}" if names else "there is none"


def _plain(field: str, value: Any) -> Any:
    if type(value) is int and field in ("answer", "group"):
        return str(value)
    if not isinstance(value, str | int | float | bool | list | dict | None):
        raise DataError(f"'{field}' is of type {type(value).__name__}; it must be a text")
    return value


def _image(value: Any) -> Any:
    """Return an image's bytes or path; the structure of Hugging Face has both, of which one may be null."""
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str | bytes | Piece | None):
        raise DataError(f"'image' is {value!r:.40}; it must be a path, or the bytes of an image")
    return value


def _nested(field: str, value: Any) -> Any:
    if field == "images" and isinstance(value, list):
        return [_image(item) for item in value]
    if field != "answers":
        return value
    if isinstance(value, list) and all(isinstance(item, tuple) for item in value):  # a mapping of Arrow
        return dict(value)
    if isinstance(value, list) and all(isinstance(item, Mapping) and _ANSWER in item for item in value):
        return [item[_ANSWER] for item in value]
    return {name: score for name, score in value.items() if score is not None} if isinstance(value, dict) else value


def _parsed(field: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(
            f"'{field}' is {text!r:.40}, which is not valid JSON ({error}); write a list or a mapping"
        ) from error


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (AttributeError, binascii.Error, ValueError) as error:
        raise DataError(
            f"'{BASE64}' is {text!r:.40}, which is no text in base64; give the bytes of an image"
        ) from error
