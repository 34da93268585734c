"""Generated files of LXMERT's tasks: annotations, features, vocabulary and answers (``dataset.synthetic=true``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from villa.config.variants import Overlay
from villa.datasets.lxmert.features import write_line
from villa.datasets.paths import SPLITS
from villa.datasets.synthetic.groups import GROUPED
from villa.datasets.synthetic.overlay import SMALL
from villa.datasets.synthetic.tasks import first_number
from villa.datasets.synthetic.world import COLOURS, HEIGHT, KINDS, VOCABULARY, WIDTH, WORDS, Regions, Thing, World
from villa.files import write_json

#: Names of the generated files besides annotations and features.
VOCABULARY_FILE, GENERATED_ANSWERS = "vocab.txt", "trainval_ans2label.json"
_ON = {"synthetic": True}

SMALL_LXMERT = (
    *SMALL,
    Overlay(
        _ON,
        {
            "batch.tokens": None,
            "batch.multiple": 1,
            "batch.drop_last": False,
            "batch.examples": 32,
            "optimizer.lr": 5e-4,
            "training.updates": 200,
            "evaluation.every": 100,
        },
    ),
    Overlay(_ON, {"dataset.max_text_length": 20}),
    Overlay(
        _ON,
        {
            "model.hidden_size": 64,
            "model.language_layers": 1,
            "model.vision_layers": 1,
            "model.cross_layers": 1,
            "model.num_heads": 4,
            "model.intermediate_size": None,
            "model.max_positions": 64,
            "model.hidden_dropout": 0.0,
            "model.attention_dropout": 0.0,
            "model.initializer_range": 0.1,  # of the order of 1 / sqrt(hidden_size)
        },
    ),
)

_ANSWERS = (*KINDS, *COLOURS, "yes", "no")
Record = dict[str, Any]


def write_lxmert(task: str, examples: int, root: Path, *, grouped: bool = False) -> None:
    """Write the files of all splits of a task into ``root``; evaluation splits get a quarter of ``examples``.

    Args:
        task: one of ``LXMERT_TASKS``.
        examples: training examples.
        root: folder to create.
        grouped: make the test split that of a robustness benchmark (``villa.datasets.synthetic.groups``).
    """
    root.mkdir(parents=True)
    entries = [*WORDS, *(f"[unused{number}]" for number in range(len(WORDS), VOCABULARY))]
    (root / VOCABULARY_FILE).write_text("\n".join(entries) + "\n", encoding="utf-8")
    write_json(root / GENERATED_ANSWERS, {answer: label for label, answer in enumerate(_ANSWERS)})
    for split in SPLITS:
        world, count = World(task, split), examples if split == "train" else examples // 4
        with (root / f"{split}_obj36.tsv").open("xb") as features:
            if grouped and split == "test":
                records = _grouped_records(task, split, count, features)
            else:
                records = [LXMERT_TASKS[task](world, split, number, features) for number in range(count)]
            write_json(root / f"{split}.json", records)


def _grouped_records(task: str, split: str, count: int, features: BinaryIO) -> list[Record]:
    """Return a test split in groups."""
    records = []
    for example in GROUPED[task](World(task, "groups"), split, first_number(split), count):
        for name, regions in example.new.items():
            _add_regions(features, name, regions)
        record: Record = {"sent": example.text, **example.membership()}
        if isinstance(example.answer, bool):
            images = {f"img{side}": name for side, name in enumerate(example.images)}
            record |= {"identifier": example.id, "label": int(example.answer), **images}
        else:
            record |= {"question_id": example.id, "img_id": example.images[0], "label": {example.answer: 1.0}}
        records.append(record)
    return records


def _question(world: World, split: str, number: int, features: BinaryIO) -> Record:
    """Return a question for the kind or colour of an image's object, or whether it is of some kind."""
    thing, question, answer = world.question()
    name = f"{split}_{number}"
    _add_image(features, name, world, thing)
    id = first_number(split) + number
    return {"question_id": id, "img_id": name, "sent": question, "label": {answer: 1.0}}


def _gqa_question(world: World, split: str, number: int, features: BinaryIO) -> Record:
    """Return a question of GQA, whose ids are texts."""
    record = _question(world, split, number, features)
    return record | {"question_id": str(record["question_id"])}


def _sentence(world: World, split: str, number: int, features: BinaryIO) -> Record:
    """Return a claim that both images show one of two kinds; both show it, or both show the other."""
    label, kinds = world.below(2), world.random.permutation(2).tolist()
    thing, claimed = Thing(kinds[0], world.below(len(COLOURS))), kinds[1 - label]
    identifier = f"{split}-{number}-0-0"
    images = {f"img{side}": f"{split}-{number}-0-img{side}" for side in (0, 1)}
    for name in images.values():
        _add_image(features, name, world, thing)
    sentence = f"each image shows a {KINDS[claimed]}"
    return {"identifier": identifier, "uid": f"nlvr2_{split}_{number}", "sent": sentence, "label": label, **images}


def _add_image(file: BinaryIO, name: str, world: World, thing: Thing) -> None:
    _add_regions(file, name, world.image(thing))


def _add_regions(file: BinaryIO, name: str, regions: Regions) -> None:
    corners = np.concatenate([regions.boxes[:, :2], regions.boxes[:, :2] + regions.boxes[:, 2:]], axis=1)
    file.write(write_line(name, (HEIGHT, WIDTH), regions.features, corners, regions.conf))


LXMERT_TASKS: dict[str, Callable[[World, str, int, BinaryIO], Record]] = {
    "lxmert_vqa": _question,
    "lxmert_gqa": _gqa_question,
    "lxmert_nlvr2": _sentence,
}
