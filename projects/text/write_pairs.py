"""Write small JSON-lines files of pairs of sentences: does the first one say that the second is true?

    python projects/text/write_pairs.py outputs/text/data

writes ``train.jsonl``, ``val.jsonl`` and ``test.jsonl`` in the form of natural language inference (MNLI and its like).
The same sentences are written every time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "black", "brown")
SHAPES = ("circle", "square", "triangle", "rectangle")
#: Pairs of every split.
COUNTS = {"train": 512, "val": 128, "test": 128}


def main() -> None:
    """Write every split into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write; made if need be")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        lines = [json.dumps(pair) + "\n" for pair in pairs(count, random)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / split}.jsonl: {count} pairs")


def pairs(count: int, random: np.random.Generator) -> Iterator[dict[str, str]]:
    """Yield pairs: a shape of some colour in another one, and a claim about a colour."""
    for _ in range(count):
        first, second, absent = random.permutation(SHAPES)[:3]
        colour, other = random.permutation(COLOURS)[:2]
        claims = {
            "entailment": f"the {first} is {colour}",
            "contradiction": f"the {first} is {other}",
            "neutral": f"the {absent} is {colour}",
        }
        answer = str(random.choice(list(claims)))
        text = f"it is a {colour} {first} in a {other} {second}"
        yield {"text": text, "text_pair": claims[answer], "answer": answer}


if __name__ == "__main__":
    main()
