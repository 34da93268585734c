"""Convert annotations to text databases (``tools/make_text_db.py``): options and readers of each task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from villa.convert.annotations import (
    read_captions,
    read_karpathy,
    read_nlvr2,
    read_snli_ve,
    read_vqa,
    vqa_questions,
    vqa_records,
)
from villa.convert.answers import MIN_OCCURRENCES, Scores, build_answers
from villa.convert.benchmarks import Subset, originals, read_nlvr2_contrasts, with_subsets
from villa.convert.example import LineRecords, RawExample
from villa.convert.regions import ReferringFiles, read_vcr, split_of
from villa.convert.text_database import Outcome, RawWordPieces, TextSource, finished_text_database, write_text_database
from villa.datasets.base import read_answers
from villa.datasets.uniter.writers import vcr_lengths
from villa.errors import ConfigError, DataError
from villa.files import read_json, sha256
from villa.progress import Mode

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class TextOptions:
    """Options of all tasks; None if not given.

    Attributes:
        annotations: file of annotations (VQA: without it there are no targets).
        questions: VQA's questions.
        answers: VQA's answer list, ``{answer: label}``.
        answers_from: files of annotations to build the answer list from instead.
        min_occurrences: how often an answer of that list must occur.
        scores: kind of the soft scores of VQA answers.
        image_set: image set of VQA's questions.
        split: split, or splits (retrieval), to read.
        refs: RefCOCO's referring expressions.
        instances: RefCOCO's objects.
        object_order: file with ``iid_to_ann_ids``, the order of ground-truth features.
        subset: names of subsets of the questions, and files that list them.
        contrasts: NLVR2's contrast sets; only the sentences that they were made from are read.
    """

    annotations: Path | None = None
    questions: Path | None = None
    answers: Path | None = None
    answers_from: tuple[Path, ...] | None = None
    min_occurrences: int | None = None
    scores: Scores | None = None
    image_set: str | None = None
    split: tuple[str, ...] | None = None
    refs: Path | None = None
    instances: Path | None = None
    object_order: Path | None = None
    subset: tuple[Subset, ...] | None = None
    contrasts: Path | None = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Task(Generic[Opened]):
    """One kind of annotations.

    Attributes:
        open: reads the files.
        required: names of options that must be given.
        optional: names of options that may be given.
    """

    open: Callable[[TextOptions], Opened]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def make_text_database(
    task: str,
    options: TextOptions,
    tokenizer: str,
    output: Path,
    *,
    tokenizer_name: str | None = None,
    missing_images: Path | None = None,
    progress: Mode = "auto",
) -> Outcome | None:
    """Convert raw annotations into a text database, or continue an unfinished one.

    Args:
        task: one of ``TASKS``.
        options: files and settings of the task.
        tokenizer: vocabulary file, folder or name; see ``RawWordPieces``.
        output: folder of the database.
        tokenizer_name: name of the tokenizer in the database.
        missing_images: JSON list of missing feature files, whose examples are left out.
        progress: how to show progress.

    Returns:
        What was done, or None if the database was finished before.

    Raises:
        ConfigError: the options do not fit the task.
        DataError: a file cannot be used, or the existing database was made with other options.
    """
    check_options(task, TASKS[task], options)
    pieces = RawWordPieces(tokenizer, tokenizer_name)
    settings = {"task": task, **{name: _recorded(value) for name, value in options.given().items()}}
    if missing_images is not None:
        settings["missing_images"] = _recorded(missing_images)
    meta = {**pieces.meta(), "options": settings}
    if finished_text_database(output, meta):
        return None
    source = TASKS[task].open(options)
    missing = frozenset() if missing_images is None else _names(missing_images)
    return write_text_database(output, source, pieces, meta, missing=missing, progress=progress)


def _vqa(options: TextOptions) -> TextSource:
    assert options.questions is not None
    total = len(vqa_questions(options.questions, options.image_set))
    labels = None
    if options.answers is not None:
        if options.answers_from is not None:
            raise ConfigError("--answers and --answers-from exclude each other; give one of them")
        labels = {answer: label for label, answer in enumerate(read_answers(options.answers))}
    elif options.annotations is not None:
        files = options.answers_from or (options.annotations,)
        records = (record for file in files for record in vqa_records(file, "annotations"))
        labels = build_answers(records, options.min_occurrences or MIN_OCCURRENCES)
    scores = options.scores or "soft"
    examples = read_vqa(options.questions, options.annotations, labels, images=options.image_set, scores=scores)
    examples = with_subsets(examples, options.subset)
    return TextSource(examples, total, files={} if labels is None else {"ans2label": labels})


def _vcr(options: TextOptions) -> TextSource:
    assert options.annotations is not None
    split = split_of(options.annotations) if options.split is None else options.split[0]
    examples = read_vcr(options.annotations, split)
    return TextSource(examples, len(LineRecords(options.annotations)), lengths=vcr_lengths)


def _nlvr2(options: TextOptions) -> TextSource:
    assert options.annotations is not None
    return TextSource(nlvr2_sentences(options), len(LineRecords(options.annotations)))


def nlvr2_sentences(options: TextOptions) -> Iterator[RawExample]:
    """Return the sentences of NLVR2, or those that contrast sets were made from."""
    assert options.annotations is not None
    sentences = read_nlvr2(options.annotations)
    return sentences if options.contrasts is None else originals(sentences, options.contrasts)


def _nlvr2_contrast(options: TextOptions) -> TextSource:
    assert options.annotations is not None
    return TextSource(read_nlvr2_contrasts(options.annotations), len(LineRecords(options.annotations)))


def _snli_ve(options: TextOptions) -> TextSource:
    assert options.annotations is not None
    return TextSource(read_snli_ve(options.annotations), len(LineRecords(options.annotations)))


def _itm(options: TextOptions) -> TextSource:
    assert options.annotations is not None
    assert options.split is not None
    examples = list(read_karpathy(options.annotations, options.split))
    return TextSource(examples, len(examples), texts_of_images=True)


def _referring(options: TextOptions) -> TextSource:
    assert options.refs is not None
    assert options.instances is not None
    assert options.split is not None
    data = ReferringFiles(options.refs, options.instances, options.split[0], options.object_order)
    examples = list(data)
    return TextSource(examples, len(examples), files=data.files())


def _captions(options: TextOptions) -> TextSource:
    assert options.annotations is not None
    total = len(LineRecords(options.annotations))
    return TextSource(read_captions(options.annotations), total, texts_of_images=True, drop_empty=True)


TASKS = {
    "vqa": Task(
        _vqa,
        ("questions",),
        ("annotations", "answers", "answers_from", "min_occurrences", "scores", "image_set", "subset"),
    ),
    "vcr": Task(_vcr, ("annotations",), ("split",)),
    "nlvr2": Task(_nlvr2, ("annotations",), ("contrasts",)),
    "nlvr2_contrast": Task(_nlvr2_contrast, ("annotations",)),
    "ve": Task(_snli_ve, ("annotations",)),
    "itm": Task(_itm, ("annotations", "split")),
    "re": Task(_referring, ("refs", "instances", "split"), ("object_order",)),
    "caption": Task(_captions, ("annotations",)),
}


def check_options(task: str, kind: Task[Any], options: TextOptions) -> None:
    """Refuse missing options, and options that a task does not take.

    Args:
        task: name of the task, for messages.
        kind: the task.
        options: the given options.

    Raises:
        ConfigError: naming the option.
    """
    given = options.given()
    missing = [name for name in kind.required if name not in given]
    if missing:
        raise ConfigError(f"task {task} needs {_flag(missing[0])}")
    foreign = [name for name in given if name not in (*kind.required, *kind.optional)]
    if foreign:
        taken = ", ".join(map(_flag, (*kind.required, *kind.optional)))
        raise ConfigError(f"{_flag(foreign[0])} is no option of task {task}; it takes {taken}")
    if task != "itm" and len(options.split or ()) > 1:
        raise ConfigError(f"task {task} reads one --split at a time; run it once for each")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _recorded(value: Any) -> Any:
    """Return an option's value for ``meta.json``: name and checksum of a file."""
    if isinstance(value, Path):
        try:
            return {"file": value.name, "sha256": sha256(value)}
        except OSError as error:
            raise DataError(f"cannot read '{value}' ({error.strerror}); mend the path") from error
    return [_recorded(item) for item in value] if isinstance(value, tuple) else value


def _names(path: Path) -> frozenset[str]:
    names = read_json(path, "list of file names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"'{path}' must hold a JSON list of file names")
    return frozenset(names)
