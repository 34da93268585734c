"""Generated test splits of robustness benchmarks: rephrased questions, contrast sets, rare and frequent answers.

Their things and words are those of the tasks that they belong to, in ways to ask that training does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from villa.datasets.synthetic.world import COLOURS, KINDS, Regions, World

#: Ways to ask a question, the first of which is that of training.
_WAYS = {
    "kind": ("what is it ?", "what is this ?", "what is here ?", "it is what ?"),
    "colour": ("which colour is it ?", "what colour is this ?", "which colour is this ?", "it is which colour ?"),
    "check": ("is it a {} ?", "is this a {} ?", "it is a {} ?", "is here a {} ?"),
}
#: Answers given less often than this many times the mean over the answers to a question are rare, as in GQA-OOD.
_RARE = 1.2


@dataclass(frozen=True)
class GroupedExample:
    """A question or sentence of a benchmark.

    Attributes:
        id: its id.
        text: the question or sentence, of words separated by spaces.
        answer: the answer, or whether the sentence is true.
        images: names of its images, without suffix.
        new: the images that no example before has had, by name.
        group: its group, or None.
        subsets: its subsets.
    """

    id: str
    text: str
    answer: str | bool
    images: tuple[str, ...]
    new: dict[str, Regions]
    group: str | None
    subsets: list[str]

    def membership(self) -> dict[str, Any]:
        """Return ``group`` and ``subsets`` as fields of a record."""
        return {**({} if self.group is None else {"group": self.group}), "subsets": self.subsets}


def rephrased_questions(world: World, split: str, first: int, count: int) -> Iterator[GroupedExample]:
    """Yield groups of a question and three rephrasings, ``count`` in all, with ids as in VQA-Rephrasings."""
    for number in range(count // 4):
        thing, kind = world.thing(), list(_WAYS)[world.below(3)]
        shown = thing.kind if world.below(2) else world.other_kind(thing.kind)
        answer = {"kind": KINDS[thing.kind], "colour": COLOURS[thing.colour]}.get(kind)
        answer = answer or ("yes" if shown == thing.kind else "no")
        name, original = f"{split}_{number}", str(first + number)
        new = {name: world.image(thing)}
        for place, way in enumerate(_WAYS[kind]):
            id_ = original if not place else f"{original}{original + str(place):>010}"
            subsets = ["rephrased" if place else "original", "yes/no" if kind == "check" else "other"]
            yield GroupedExample(id_, way.format(KINDS[shown]), answer, (name,), new, original, subsets)
            new = {}


def rare_and_frequent_answers(world: World, split: str, first: int, count: int) -> Iterator[GroupedExample]:
    """Yield questions whose answers are frequent (``head``) or rare (``tail``) among those to the same question."""
    asked = [world.question() for _ in range(count)]
    given = Counter((text, answer) for _, text, answer in asked)
    answers = {text: [n for (question, _), n in given.items() if question == text] for _, text, _ in asked}
    for number, (thing, text, answer) in enumerate(asked):
        mean = sum(answers[text]) / len(answers[text])
        subset, name = "tail" if given[text, answer] < _RARE * mean else "head", f"{split}_{number}"
        new = {name: world.image(thing)}
        yield GroupedExample(str(first + number), text, answer, (name,), new, None, [subset])


def contrasted_sentences(world: World, split: str, first: int, count: int) -> Iterator[GroupedExample]:
    """Yield groups of a sentence, one of which a word is exchanged, and one about another image: ``count`` in all."""
    for number in range(count // 3):
        thing, true = world.thing(), bool(world.below(2))
        another = world.other_kind(thing.kind)
        claimed, exchanged = (thing.kind, another) if true else (another, thing.kind)
        identifier = f"{split}-{first + number}-0-0"
        pair = tuple(f"{identifier.rpartition('-')[0]}-img{side}" for side in (0, 1))
        new = {name: world.image(thing) for name in pair}
        yield GroupedExample(identifier, _claim(claimed), true, pair, new, identifier, ["original"])
        for contrast, kind, shows in ((1, exchanged, thing.kind), (2, claimed, another)):
            id_ = f"{identifier}-{contrast}"
            images = tuple(f"{id_}-img{side}" for side in (0, 1))
            new = {name: world.image(replace(thing, kind=shows)) for name in images}
            yield GroupedExample(id_, _claim(kind), kind == shows, images, new, identifier, ["contrast"])


def _claim(kind: int) -> str:
    return f"each image shows a {KINDS[kind]}"


#: Generators of the examples of a split, by data set: given the world, the split, the first number and how many.
GROUPED: dict[str, Callable[[World, str, int, int], Iterator[GroupedExample]]] = {
    **dict.fromkeys(("vqa", "lxmert_vqa"), rephrased_questions),
    "lxmert_gqa": rare_and_frequent_answers,
    **dict.fromkeys(("nlvr2", "lxmert_nlvr2"), contrasted_sentences),
}
