"""Draw a small data set of coloured shapes in the form of one's own data: images and JSON-lines files of questions.

    python projects/own_data/draw.py outputs/own_data/data

writes ``images/*.png``, ``train.jsonl``, ``val.jsonl`` and ``test.jsonl`` (questions with answers),
``captions_*.jsonl`` (a caption for each image), ``classes_*.jsonl`` (its colour, as a class), and ``questions.jsonl``
(questions alone, to predict on). The same numbers are drawn every time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from villa.datasets.synthetic.pictures import COLOURS, SHAPES, draw_shape

#: Images of every colour and shape.
COPIES = {"train": 6, "val": 2, "test": 2}


def main() -> None:
    """Draw every split into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write; made if need be")
    folder: Path = parser.parse_args().folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, copies in COPIES.items():
        records = list(draw_split(folder, split, copies, random))
        write_lines(folder / f"{split}.jsonl", records)
        write_lines(folder / f"captions_{split}.jsonl", captions(split, copies))
        asked = [record for record in records if record["answer"] in COLOURS]
        write_lines(folder / f"classes_{split}.jsonl", asked)
        print(f"{folder / split}.jsonl: {len(records)} questions")
    write_lines(folder / "questions.jsonl", [{"image": r["image"], "question": r["question"]} for r in records[:6]])


def draw_split(folder: Path, split: str, copies: int, random: np.random.Generator) -> Iterator[dict[str, str]]:
    """Draw ``copies`` images of every coloured shape; yield three questions about each."""
    for copy in range(copies):
        for colour in COLOURS:
            for shape in SHAPES:
                name = f"images/{split}_{colour}_{shape}_{copy}.png"
                draw_shape(colour, shape, random).save(folder / name)
                other = SHAPES[int(random.integers(len(SHAPES)))]
                yield {"image": name, "question": "What is the colour of the shape?", "answer": colour}
                yield {"image": name, "question": "Which shape is in the picture?", "answer": shape}
                yield {"image": name, "question": f"Is it a {other}?", "answer": "yes" if other == shape else "no"}


def captions(split: str, copies: int) -> list[dict[str, str]]:
    """Return a line for each image of a split, with its caption."""
    return [
        {"image": f"images/{split}_{colour}_{shape}_{copy}.png", "text": f"a {colour} {shape}"}
        for copy in range(copies)
        for colour in COLOURS
        for shape in SHAPES
    ]


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
