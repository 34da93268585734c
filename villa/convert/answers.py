"""Answers of VQA v2: normalisation, the list of answers that are labels, and soft scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from villa.convert.example import RawRecord
from villa.errors import DataError

#: The score of an answer given by a number of the ten annotators.
#:
#: ``soft``: 0.3, 0.6, 0.9, 1 for 1, 2, 3, 4 or more, which is VQA v2's accuracy averaged over the ten ways to leave one
#: annotator out, and what the released databases store. ``thirds``: min(count / 3, 1).
Scores = Literal["soft", "thirds"]

#: Labels are the answers that are at least so often a question's most frequent one (3129 of train and val).
MIN_OCCURRENCES = 9

_SOFT = (0.0, 0.3, 0.6, 0.9, 1.0)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
#: Contractions to which VQA v2's evaluation restores a missing apostrophe.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _restored() -> dict[str, str]:
    """Map each contraction with one apostrophe missing to the contraction."""
    places = ((word, place) for word in _CONTRACTIONS.split() for place, letter in enumerate(word) if letter == "'")
    return {word[:place] + word[place + 1 :]: word for word, place in places}


_RESTORED = _restored()


@lru_cache(1 << 16)
def normalise_answer(answer: str) -> str:
    """Normalise an answer by the rules of VQA v2's evaluation (Goyal et al., 2017).

    Lower case; no punctuation (full stops and apostrophes within words stay), articles or commas; number words up to
    ten as digits; contractions with their apostrophe.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip().lower()
    kept = text
    for mark in _PUNCTUATION:
        drop = f"{mark} " in text or f" {mark}" in text or _THOUSANDS.search(text) is not None
        kept = kept.replace(mark, "" if drop else " ")
    words = (_DIGITS.get(word, word) for word in _FULL_STOP.sub("", kept).split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in ARTICLES).replace(",", "")


def build_answers(annotations: Iterable[RawRecord], min_occurrences: int = MIN_OCCURRENCES) -> dict[str, int]:
    """Build the answer list: the answers that are often the most frequent one of a question.

    Args:
        annotations: records of annotation files (officially those of train and val together).
        min_occurrences: how often an answer must be a question's ``multiple_choice_answer``.

    Returns:
        Label of each answer, by descending frequency, ties in alphabetical order.

    Raises:
        DataError: no answer occurs so often.
    """
    counts = Counter(normalise_answer(record.text("multiple_choice_answer")) for record in annotations)
    often = [answer for answer, count in counts.items() if count >= min_occurrences]
    if not often:
        raise DataError(
            f"no answer occurs {min_occurrences} times in the annotations; give an answer list (--answers), or lower "
            "--min-occurrences"
        )
    return {answer: label for label, answer in enumerate(sorted(often, key=lambda answer: (-counts[answer], answer)))}


def answer_target(annotation: RawRecord, labels: Mapping[str, int], scores: Scores) -> dict[str, list[Any]]:
    """Return the soft target of a question.

    Args:
        annotation: record with ``answers``, a list of ``{"answer": text}``; a single one (Visual Genome) scores 1.
        labels: label of each answer of the answer list; other answers are left out.
        scores: kind of the scores.

    Returns:
        ``{"labels": [int], "scores": [float]}``; both may be empty.

    Raises:
        DataError: the annotation has no such answers.
    """
    known = {
        labels[answer]: score
        for answer, score in human_scores(human_answers(annotation), scores).items()
        if answer in labels
    }
    return {"labels": list(known), "scores": list(known.values())}


def human_answers(annotation: RawRecord) -> list[str]:
    """Return the normalised answers of the annotators.

    Args:
        annotation: record with ``answers``, a list of ``{"answer": text}``.

    Raises:
        DataError: the annotation has no such answers.
    """
    return [normalise_answer(entry.text("answer")) for entry in annotation.records("answers")]


def human_scores(answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """Return the score of every distinct answer; a single one (Visual Genome) scores 1."""
    counts = Counter(answers)
    if len(answers) == 1:
        counts[answers[0]] = len(_SOFT)
    return {answer: _score(count, scores) for answer, count in counts.items()}


def _score(count: int, scores: Scores) -> float:
    return _SOFT[min(count, len(_SOFT) - 1)] if scores == "soft" else min(count / 3, 1.0)
