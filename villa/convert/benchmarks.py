"""Robustness benchmarks: contrast sets of NLVR2, and questions that files list as a subset (GQA-OOD, VQA-CE)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from villa.convert.annotations import nlvr2_target, read_entries
from villa.convert.example import LineRecords, RawExample, RawRecord, starts_list
from villa.errors import ConfigError, DataError
from villa.files import read_json

#: A subset: its name, and the file that lists its questions.
Subset = tuple[str, Path]
#: Dashes of an identifier of NLVR2 such as ``test1-769-1-0``.
_DASHES = 3


def read_nlvr2_contrasts(annotations: Path) -> Iterator[RawExample]:
    """Yield the sentences of NLVR2's contrast sets (``contrast_set_nlvr2.jsonl``, Gardner et al., 2020).

    ``test1-769-1-0-2`` is contrast 2 of sentence ``test1-769-1-0``, which names the group. Every contrast has two
    images of its own, ``test1-769-1-0-2-img0`` and ``-img1``.

    Raises:
        DataError: a record lacks a field, or its identifier or label is of another form.
    """
    for record in LineRecords(annotations):
        identifier = record.text("identifier")
        images = [f"nlvr2_{identifier}-img{side}.npz" for side in (0, 1)]
        fields: dict[str, Any] = {**record.values, "target": nlvr2_target(record)}
        texts = {"input_ids": (record.text("sentence"),)}
        yield RawExample(identifier, texts, images, fields, record.where, _contrasted(record), ("contrast",))


def _contrasted(record: RawRecord) -> str:
    """Return the identifier of the sentence that a contrast was made from."""
    identifier = record.text("identifier")
    original, _, number = identifier.rpartition("-")
    if original.count("-") != _DASHES or not number.isdecimal():
        raise DataError(
            f"{record.where}: identifier '{identifier:.80}' is none of a contrast set; it must be like "
            "'test1-769-1-0-2', the identifier of the original sentence and a number"
        )
    return original


def originals(sentences: Iterable[RawExample], contrasts: Path) -> Iterator[RawExample]:
    """Yield, of the sentences of NLVR2, those that contrast sets were made from, as members of their groups.

    Args:
        sentences: the sentences of NLVR2's test set.
        contrasts: the file of the contrast sets.

    Raises:
        DataError: the file cannot be used.
    """
    wanted = set(map(_contrasted, LineRecords(contrasts)))
    for example in sentences:
        if example.id in wanted:
            yield replace(example, group=example.id, subsets=("original",))


def add_group_options(parser: argparse.ArgumentParser, tasks: str) -> None:
    """Add a command's options for examples that belong together.

    Args:
        parser: parser of the command.
        tasks: those whose questions may have subsets, for the help.
    """
    parser.add_argument(
        "--subset",
        type=named_file,
        nargs="+",
        metavar="NAME=FILE",
        help=f"{tasks}: subsets of the questions, and files that list their ids",
    )
    parser.add_argument(
        "--contrasts", type=Path, help="nlvr2: only the sentences that these contrast sets were made from"
    )


def named_file(text: str) -> Subset:
    """Parse ``NAME=FILE``.

    Raises:
        ConfigError: it has another form.
    """
    name, sign, file = text.partition("=")
    if not (name and sign and file):
        raise ConfigError(f"--subset {text}: give a name and a file, like tail=ood_testdev_tail.json")
    return name, Path(file)


def with_subsets(examples: Iterable[RawExample], subsets: Sequence[Subset] | None) -> Iterator[RawExample]:
    """Yield examples with the names of the subsets that list them.

    Args:
        examples: the examples.
        subsets: names and files. A file is a JSON list of ids, or an object with the ids as keys, such as a file of
            questions of GQA.

    Raises:
        DataError: a file cannot be used, or lists a question that there is not.
    """
    listed = [(name, file, set(_ids(file))) for name, file in subsets or ()]
    seen: set[str] = set()
    for example in examples:
        found = tuple(name for name, _, ids in listed if example.id in ids)
        if listed:
            seen.add(example.id)
        yield replace(example, subsets=(*example.subsets, *found)) if found else example
    for name, file, ids in listed:
        if missing := ids - seen:
            raise DataError(
                f"subset {name}: '{file}' lists {len(missing):,} of its {len(ids):,} questions, such as "
                f"'{min(missing)}', that are not among those read; give the questions that it is a subset of"
            )


def _ids(file: Path) -> Iterator[str]:
    """Yield the ids that a file lists.

    Raises:
        DataError: it holds something else, or an id twice.
    """
    if not starts_list(file):
        yield from (identifier for identifier, _ in read_entries(file))
        return
    for number, value in enumerate(read_json(file, "list of ids"), start=1):
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise DataError(f"{file}: entry {number}: an id must be a text or a number, not {value!r:.40}")
        yield str(value)
