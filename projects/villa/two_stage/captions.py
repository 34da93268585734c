r"""Captions from questions and their answers, by a rule for each form of question; the first that fits counts.

| question | answer | caption |
|---|---|---|
| is / are there X | yes | there is / are X |
| is X present | yes | X is present |
| does the image contain X | yes | the image contains X |
| how many X | N | N X |
| what / which color is / are X; what is the color of X | C | X is / are C |
| what shape V ..., what object(s) V ..., what V ... (V is a verb form: is, are, does) | A | A V ... |
| any other | A | the question, then A |

Questions that deny (``not``, ``no X``) and answers ``no`` give none: a caption says what is there, not what is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_NEGATION = re.compile(r"\b(not|no)\b")


def _answer_first(match: re.Match[str], answer: str) -> str:
    return f"{answer} {match['rest']}"


_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], str]], ...] = (
    (re.compile(r"(?P<verb>is|are) there (?P<rest>.+)"), lambda m, _: f"there {m['verb']} {m['rest']}"),
    (re.compile(r"(?P<verb>is|are) (?P<rest>.+) present"), lambda m, _: f"{m['rest']} {m['verb']} present"),
    (re.compile(r"does (?P<who>the \w+) contain (?P<rest>.+)"), lambda m, _: f"{m['who']} contains {m['rest']}"),
    (re.compile(r"how many (?P<rest>.+)"), _answer_first),
    (
        re.compile(r"(?:what|which) colou?rs? (?P<verb>is|are) (?P<rest>.+)"),
        lambda m, a: f"{m['rest']} {m['verb']} {a}",
    ),
    (re.compile(r"what (?P<verb>is|are) the colou?rs? of (?P<rest>.+)"), lambda m, a: f"{m['rest']} {m['verb']} {a}"),
    (re.compile(r"what shape does (?P<who>the \w+) contain"), lambda m, a: f"{m['who']} contains a {a}"),
    (re.compile(r"(?:what|which)(?: shape| objects?)? (?P<rest>(?:is|are) .+)"), _answer_first),
)


def caption(question: str, answer: str) -> str | None:
    """Return what a question and its answer say about a picture, or None where that is only what is not there.

    Args:
        question: in lower case, with or without its question mark.
        answer: its answer.
    """
    text = " ".join(question.lower().replace("?", " ").split())
    answer = answer.replace("_", " ")
    if answer == "no" or _NEGATION.search(text):
        return None
    for pattern, write in _RULES:
        match = pattern.fullmatch(text)
        if match is not None:
            return write(match, answer)
    return f"{text} {answer}"
