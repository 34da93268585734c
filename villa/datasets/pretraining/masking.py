"""What masked modelling hides: words or regions, never both at once.

The draws follow the release in every detail, so that equal generators give equal masks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

#: Share of the words, and of the regions, that are masked.
PROBABILITY = 0.15
#: Of the masked words, the shares that become [MASK], and that become [MASK] or another word; the others stay.
_MASK, _CHANGED = 0.8, 0.9


def mask_words(
    words: Sequence[int],
    mask_id: int,
    vocabulary: tuple[int, int],
    draws: random.Random,
    probability: float = PROBABILITY,
) -> tuple[list[int], list[bool]]:
    """Mask each word-piece on its own; where none was drawn, the first one becomes [MASK].

    Args:
        words: without [CLS] and [SEP], which are never masked.
        mask_id: id of [MASK].
        vocabulary: first id and end of those that a random word is drawn from.
        draws: the generator.
        probability: share that is masked.

    Returns:
        The words to read, and for each whether it is asked for (also where it stayed).
    """
    read, asked = list(words), [False] * len(words)
    for place in range(len(words)):
        drawn = draws.random()
        if drawn >= probability:
            continue
        asked[place] = True
        if drawn < _MASK * probability:
            read[place] = mask_id
        elif drawn < _CHANGED * probability:
            read[place] = draws.choice(range(*vocabulary))
    if words and not any(asked):
        read[0], asked[0] = mask_id, True
    return read, asked


def mask_regions(count: int, draws: random.Random, probability: float = PROBABILITY) -> list[bool]:
    """Draw which of ``count`` regions are masked, each on its own; where none was drawn, any one."""
    masked = [draws.random() < probability for _ in range(count)]
    if count and not any(masked):
        masked[draws.choice(range(count))] = True
    return masked


def wrong_image(images: Sequence[str], right: str, draws: random.Random) -> str:
    """Draw an image that is not ``right`` out of different images, at least two."""
    while (drawn := draws.sample(images, 1)[0]) == right:
        pass
    return drawn
