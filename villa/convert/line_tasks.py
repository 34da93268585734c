"""Convert annotations to files of questions (``tools/make_jsonl.py``): options, records and image paths of a task."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from villa.convert.annotations import (
    CLASSES,
    count_gqa,
    gqa_answers,
    read_gqa,
    read_snli_ve,
    read_vqa,
    vqa_questions,
    vqa_records,
)
from villa.convert.answers import MIN_OCCURRENCES, Scores, build_answers, human_answers, human_scores
from villa.convert.benchmarks import read_nlvr2_contrasts, with_subsets
from villa.convert.example import LineRecords, RawExample, RawRecord
from villa.convert.tasks import Task, TextOptions, check_options, nlvr2_sentences
from villa.datasets.base import answer_list
from villa.errors import ConfigError, DataError, one_line
from villa.files import atomic_write, replacing
from villa.progress import Mode, track

#: Layouts of a written file: JSON lines (``dataset=jsonl``), or LXMERT's list (``dataset=lxmert_vqa`` ...).
Layout = Literal["jsonl", "lxmert"]


@dataclass(frozen=True)
class Line:
    """A line to write.

    Attributes:
        fields: fields of the record without the images.
        images: possible paths of each image below a folder of images, the likeliest first.
        where: where the example was read, for messages.
    """

    fields: dict[str, Any]
    images: Sequence[Sequence[str]]
    where: str

    @classmethod
    def of(cls, example: RawExample, images: Sequence[Sequence[str]], **answer: Any) -> Line:
        """Make a line from an example with one text, and its answer if there is one."""
        (words,) = example.texts.values()
        fields = {"id": example.id, "question": " ".join(map(str, words)), **answer, **example.membership()}
        return cls(fields, images, example.where)


@dataclass(frozen=True)
class LineSource:
    """An opened file of annotations.

    Attributes:
        lines: the lines to write.
        total: most lines that there can be; None if unknown.
        answers: returns the answers that are labels; None if the questions have no answers.
    """

    lines: Iterable[Line]
    total: int | None = None
    answers: Callable[[], Sequence[str]] | None = None


@dataclass
class Counts:
    """Numbers of lines written, and left out because an image is missing."""

    written: int = 0
    left_out: int = 0


def write_lines(
    source: LineSource,
    output: Path,
    images: Path | None = None,
    *,
    layout: Layout = "jsonl",
    skip_missing: bool = False,
    progress: Mode = "auto",
) -> Counts:
    """Write a file of questions, atomically.

    Args:
        source: the lines.
        output: the file.
        images: folder of the images. Lines then have paths, relative to the folder of ``output``, of existing images;
            without it, paths for ``dataset.image_root``, which are not checked.
        layout: JSON lines, or the list of records that LXMERT's tasks read.
        skip_missing: leave out lines with missing images instead of stopping at the first one.
        progress: how to show progress.

    Raises:
        DataError: an image is missing, two lines have the same id, nothing is left, or the file cannot be written.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"'{images}' is not a folder; give --images the folder with the images")
    finder = _Finder(images, output)
    counts = Counts()
    before, between, after = {"jsonl": ("", "\n", "\n"), "lxmert": ("[\n", ",\n", "\n]\n")}[layout]
    try:
        with replacing(output) as temporary, temporary.open("x", encoding="utf-8") as file:
            for record, where in _records(source, finder, skip_missing, counts, progress):
                written = record if layout == "jsonl" else lxmert_record(record)
                try:
                    file.write((before if counts.written == 1 else between) + json.dumps(written, ensure_ascii=False))
                except UnicodeEncodeError as error:
                    raise DataError(f"{where}: a text holds half a character ({one_line(error)}); mend it") from error
            if not counts.written:
                raise DataError(f"no line is left for '{output}' ({counts.left_out:,} lack their images)")
            file.write(after)
    except OSError as error:
        raise DataError(f"'{output}' cannot be written: {one_line(error)}") from error
    return counts


def lxmert_record(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line as a record of LXMERT's annotations, which name images without folder and suffix."""
    record: dict[str, Any] = {"sent": line["question"]}
    answer = line.get("answer")
    if "images" in line:
        record |= {"identifier": line["id"], **{f"img{i}": _stem(path) for i, path in enumerate(line["images"])}}
        record |= {} if answer is None else {"label": _TRUTH.index(answer)}
    else:
        record |= {"question_id": line["id"], "img_id": _stem(line["image"])}
        record |= {} if answer is None else {"label": {answer: 1.0}}
        record |= {"label": line["answers"]} if "answers" in line else {}
    return record | {name: line[name] for name in ("group", "subsets") if name in line}


def _stem(path: str) -> str:
    return PurePosixPath(path).stem


def _records(
    source: LineSource, finder: _Finder, skip_missing: bool, counts: Counts, progress: Mode
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the records to write, each with the place where it was read."""
    seen: set[str] = set()
    for line in track(source.lines, "writing lines", source.total, mode=progress):
        if line.fields["id"] in seen:
            raise DataError(f"{line.where}: the id '{line.fields['id']}' occurs twice; ids must be unique")
        seen.add(line.fields["id"])
        paths = [finder.find(places, line.where) for places in line.images]
        if None in paths:
            if not skip_missing:
                places = " or ".join(f"'{place}'" for place in line.images[paths.index(None)])
                raise DataError(
                    f"{line.where}: there is no image {places} below '{finder.folder}'; get the images, or leave out "
                    "what lacks them by --skip-missing"
                )
            counts.left_out += 1
            continue
        counts.written += 1
        yield {**line.fields, **({"image": paths[0]} if len(paths) == 1 else {"images": paths})}, line.where


class _Finder:
    """Finds images below a folder.

    Args:
        folder: folder of the images; None takes the likeliest path unchecked.
        output: file to whose folder the paths are relative.
    """

    def __init__(self, folder: Path | None, output: Path) -> None:
        self.folder = folder
        self._prefix = PurePosixPath()
        if folder is not None:
            self._prefix = PurePosixPath(os.path.relpath(folder.resolve(), output.parent.resolve()))

    def find(self, places: Sequence[str], where: str) -> str | None:
        """Return the path of an image, or None if it is at none of the places.

        Raises:
            DataError: a place is outside of the folder.
        """
        if any(place.startswith("/") or ".." in place.split("/") for place in places):
            raise DataError(f"{where}: '{places[-1]:.80}' is no name of an image; download the file again")
        if self.folder is None:
            return places[0]
        for place in places:
            if (self.folder / place).is_file():
                return str(self._prefix / place)
        return None


#: Answers of NLVR2 in the order of the labels, 0 and 1.
_TRUTH = ("False", "True")


def make_lines(
    task: str,
    options: TextOptions,
    output: Path,
    *,
    images: Path | None = None,
    layout: Layout = "jsonl",
    answers_file: Path | None = None,
    skip_missing: bool = False,
    force: bool = False,
    progress: Mode = "auto",
) -> tuple[Counts, int | None]:
    """Convert raw annotations into a JSON-lines file and, if asked to, a file of answers.

    Args:
        task: one of ``LINE_TASKS``.
        options: files and settings of the task.
        output: file to write.
        images: folder of the images; see ``write_lines``.
        layout: layout of the file; LXMERT's always has scores of VQA's answers, by default ``soft``.
        answers_file: file to write the answers to, in the order of the labels; see ``answer_list``.
        skip_missing: leave out lines with missing images.
        force: replace existing files.
        progress: how to show progress.

    Returns:
        Numbers of lines, and the number of listed answers.

    Raises:
        ConfigError: the options do not fit the task, or a file exists already.
        DataError: a file cannot be used.
    """
    check_options(task, LINE_TASKS[task], options)
    for path in (output, answers_file):
        if path is not None and path.exists() and (path.is_dir() or not force):
            advice = "give the name of a file" if path.is_dir() else "give another name, or --force to replace it"
            raise ConfigError(f"output '{path}' exists; {advice}")
    if layout == "lxmert":
        if task == "ve" or images is not None:
            wrong = "--task ve, which LXMERT does not have" if task == "ve" else "--images, as it names no files"
            raise ConfigError(f"--layout lxmert does not go with {wrong}; leave one out")
        options = replace(options, scores=options.scores or "soft") if task == "vqa" else options
    if images is None and skip_missing:
        raise ConfigError("--skip-missing looks for images; give their folder by --images")
    source = LINE_TASKS[task].open(options)
    answers = None
    if answers_file is not None:
        if source.answers is None:
            raise ConfigError(f"nothing given answers the questions of task {task}; leave out --answers-file")
        answers = list(source.answers())
        listed = answer_list(answers_file, answers)
    counts = write_lines(source, output, images, layout=layout, skip_missing=skip_missing, progress=progress)
    if answers_file is None or answers is None:
        return counts, None
    try:
        atomic_write(answers_file, listed)
    except OSError as error:
        raise DataError(f"'{answers_file}' cannot be written: {one_line(error)}") from error
    return counts, len(answers)


def _vqa(options: TextOptions) -> LineSource:
    assert options.questions is not None
    total = len(vqa_questions(options.questions, options.image_set))
    examples = with_subsets(read_vqa(options.questions, options.annotations, images=options.image_set), options.subset)
    answered = options.annotations is not None
    lines = (_vqa_line(example, options.scores, answered) for example in examples)
    files = options.answers_from or (() if options.annotations is None else (options.annotations,))

    def answers() -> list[str]:
        records = (record for file in files for record in vqa_records(file, "annotations"))
        return list(build_answers(records, options.min_occurrences or MIN_OCCURRENCES))

    return LineSource(lines, total, answers if files else None)


def _vqa_line(example: RawExample, scores: Scores | None, answered: bool) -> Line:
    record = RawRecord(example.fields, example.where)
    named, _, digits = str(example.images).removesuffix(".npz").rpartition("_")  # the image's number
    images = named.removeprefix("coco_")
    name = f"{int(digits)}.jpg" if images == "vg" else f"COCO_{images}_{digits}.jpg"
    folders = ("VG_100K", "VG_100K_2") if images == "vg" else (images,)
    places = [name, *(f"{folder}/{name}" for folder in folders)]
    if not answered:
        return Line.of(example, [places])
    given = human_answers(record)
    if not given:
        raise DataError(f"{example.where}: 'answers' is empty; download the annotations again")
    return Line.of(example, [places], answers=given if scores is None else human_scores(given, scores))


def _gqa(options: TextOptions) -> LineSource:
    assert options.questions is not None
    questions = options.questions
    files = options.answers_from or (questions,)
    lines = _gqa_lines(with_subsets(read_gqa(questions), options.subset))
    return LineSource(lines, count_gqa(questions), lambda: _required(gqa_answers(files), files))


def _gqa_lines(examples: Iterable[RawExample]) -> Iterator[Line]:
    for example in examples:
        name = f"{example.fields['imageId']}.jpg"
        answer = {"answer": example.fields["answer"]} if "answer" in example.fields else {}
        yield Line.of(example, [[name, f"images/{name}"]], **answer)


def _required(answers: list[str], files: tuple[Path, ...]) -> list[str]:
    if not answers:
        raise DataError(f"'{files[0]}' gives no answer; list files with answers in --answers-from")
    return answers


def _nlvr2(options: TextOptions) -> LineSource:
    assert options.annotations is not None
    lines = map(_nlvr2_line, nlvr2_sentences(options))
    return LineSource(lines, len(LineRecords(options.annotations)), lambda: _TRUTH)


def _nlvr2_contrast(options: TextOptions) -> LineSource:
    assert options.annotations is not None
    lines = map(_contrast_line, read_nlvr2_contrasts(options.annotations))
    return LineSource(lines, len(LineRecords(options.annotations)), lambda: _TRUTH)


def _contrast_line(example: RawExample) -> Line:
    # Images are called by the contrast, and are of either kind.
    places = [[f"{example.id}-img{side}.{kind}" for kind in ("png", "jpg")] for side in (0, 1)]
    return Line.of(example, places, **_truth(example))


def _nlvr2_line(example: RawExample) -> Line:
    pair = example.id.rpartition("-")[0]
    split, directory = pair.partition("-")[0], example.fields.get("directory")
    # Images of the training split are in numbered folders, the others in one folder per split.
    folder = f"{split}/{directory}" if directory is not None else split
    names = [f"{pair}-img{side}.png" for side in (0, 1)]
    inner = [] if directory is None else [f"{directory}/"]
    places = [[f"{prefix}{name}" for prefix in (*inner, "", f"{folder}/", f"images/{folder}/")] for name in names]
    return Line.of(example, places, **_truth(example))


def _truth(example: RawExample) -> dict[str, str]:
    """Return the answer of a sentence of NLVR2 as a field; nothing if it is hidden."""
    target = example.fields["target"]
    return {} if target is None else {"answer": _TRUTH[target]}


def _snli_ve(options: TextOptions) -> LineSource:
    assert options.annotations is not None
    lines = map(_snli_ve_line, read_snli_ve(options.annotations))
    return LineSource(lines, len(LineRecords(options.annotations)), lambda: sorted(CLASSES, key=CLASSES.__getitem__))


def _snli_ve_line(example: RawExample) -> Line:
    record = RawRecord(example.fields, example.where)
    name = f"{record.text('Flickr30K_ID', 'Flikr30kID').removesuffix('.jpg')}.jpg"
    return Line.of(example, [[name, f"flickr30k-images/{name}"]], answer=record.text("gold_label"))


_VQA_OPTIONS = ("annotations", "answers_from", "min_occurrences", "scores", "image_set", "subset")
LINE_TASKS: dict[str, Task[LineSource]] = {
    "vqa": Task(_vqa, ("questions",), _VQA_OPTIONS),
    "gqa": Task(_gqa, ("questions",), ("answers_from", "subset")),
    "nlvr2": Task(_nlvr2, ("annotations",), ("contrasts",)),
    "nlvr2_contrast": Task(_nlvr2_contrast, ("annotations",)),
    "ve": Task(_snli_ve, ("annotations",)),
}
