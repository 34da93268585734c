"""Tiny checkpoints of transformers, and questions about pictures for them, as files and as batches."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from villa.batch import Batch
from villa.datasets.own.jsonl import Jsonl, JsonlConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "huggingface"))
import tiny_checkpoints as tiny

GENERATIVE = [name for name, architecture in tiny.ARCHITECTURES.items() if architecture.image_token is not None]
QUESTIONS = ("What shape is it?", "is it red", "color of the square")
ANSWERS = ("square", "no", "dark green")
TARGETS = {"classification": "class", "generation": "text", "contrastive": "pair"}


@cache
def tiny_folder(name: str, parent: Path) -> Path:
    """A tiny checkpoint of an architecture, written once."""
    return tiny.write(name, parent / name)


def write_questions(folder: Path, side: int = 48) -> Path:
    """Write pictures of noise, and a file of questions about them."""
    random = np.random.default_rng(0)
    lines = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        pixels = random.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"question": question, "answer": answer, "image": f"{number}.png"})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_data(path: Path, processor: Path | None, task: str, **options: Any) -> Jsonl:
    """The data set of a file of questions, for a task."""
    given = {"processor": None if processor is None else str(processor), "target": TARGETS[task]}
    return Jsonl(JsonlConfig(train=str(path), **given | options))  # type: ignore[arg-type]


def make_batch(folder: Path, task: str, questions: Path) -> Batch:
    """All questions in one batch, as the architecture's processor reads them."""
    data = make_data(questions, folder, task)
    split = data.split("train")
    return data.collate([split[index] for index in range(len(split))])
