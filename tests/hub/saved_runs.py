"""Short runs of each kind of model, for tests that save and load them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from villa.cli.run import main

COLOURS = ("red", "green", "blue")
#: As frequent as each other, so in the order of the alphabet.
LABELS = sorted(COLOURS)
COMMON = (
    "batch.examples=8",
    "training.updates=3",
    "optimizer.lr=0.01",
    "logging.progress=off",
    "logging.tensorboard=false",
    "logging.figures=false",
    "device=cpu",
)
MODELS: dict[str, tuple[str, ...]] = {
    "uniter": ("model=uniter", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"),
    "lxmert": (
        *("model=lxmert", "model.hidden_size=16", "model.num_heads=2", "model.max_positions=20"),
        *("model.language_layers=1", "model.vision_layers=1", "model.cross_layers=1"),
    ),
    "text_classifier": (
        "model=text_classifier",
        "model.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    ),
}


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_data(folder: Path, *, features: bool) -> list[str]:
    """Write questions about feature files, or without; return the arguments of the data set."""
    random = np.random.default_rng(0)
    records = []
    for index in range(12):
        record = {"question": f"is it {COLOURS[index % 3]}?", "answer": COLOURS[index % 3]}
        if features:
            record["features"] = f"{index}.npz"
            boxes = np.tile(np.float32([0, 0, 1, 1]), (2, 1))
            np.savez(folder / f"{index}.npz", features=random.normal(size=(2, 6)).astype(np.float32), boxes=boxes)
        records.append(record)
    file = write_lines(folder / "questions.jsonl", records)
    return ["dataset=jsonl", *(f"dataset.{split}={file}" for split in ("train", "val", "test"))]


def train(name: str, folder: Path) -> Path:
    """Train a model for three updates on data in ``folder``; return the run's folder."""
    folder.mkdir(exist_ok=True)
    data = write_data(folder, features=name != "text_classifier")
    villa = ("trainer=villa", "trainer.modality=text")
    assert main([*MODELS[name], *data, *villa, *COMMON, f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


def requests(folder: Path) -> list[dict[str, Any]]:
    """The questions of ``write_data`` as records to predict."""
    records = read_lines(folder / "questions.jsonl")
    for record in records:
        del record["answer"]
        if "features" in record:
            record["features"] = str(folder / record["features"])
    return records
