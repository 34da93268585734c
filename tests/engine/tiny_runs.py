"""Runs in this process that take a fraction of a second: the example project, and a made-up ``jsonl`` data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapes  # noqa: F401 - registers the example project's classes
import torch

from villa.checkpoints.store import CheckpointStore
from villa.cli.run import main
from villa.config import load
from villa.engine.loop import Training
from villa.engine.setup import build
from villa.engine.train import assemble
from villa.files import sha256
from villa.tracking import Trackers

#: The example project without its recipe; four updates of eight examples.
SHAPES = (
    "model=average",
    "model.hidden_size=8",
    "dataset=shapes",
    "dataset.examples=32",
    "optimizer.lr=0.01",
    "batch.examples=8",
    "training.updates=4",
    "logging.every=1",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
)
COLOURS = ("red", "green", "blue")


def run(folder: Path, *args: str) -> int:
    """Run ``SHAPES`` with further arguments into ``folder``; return the exit code."""
    return main([*SHAPES, f"output_dir={folder}", *args])


def training(folder: Path, *args: str, recipe: Sequence[str] = SHAPES) -> Training:
    """The training of a recipe with further arguments, not started, without trackers."""
    config = load([*recipe, f"output_dir={folder}", *args]).config
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    return assemble(build(config), store, Trackers({}))


def log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in a run's log."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def updates(folder: Path, kind: str) -> list[int]:
    """The updates at which records of a kind were logged."""
    return [record["update"] for record in log(folder, kind)]


def metrics(folder: Path) -> dict[str, Any]:
    """A run's ``metrics.json``."""
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return values


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def error(text: str) -> str:
    """The one line of an error message, after what was shown of the progress."""
    *shown, message = text.splitlines()
    assert message.startswith("villa_run: error: ")
    assert all(line.startswith(("checking ", "villa_run: dropped ", "predict ", "test ")) for line in shown)
    return message


def colours(folder: Path, examples: int = 24) -> list[str]:
    """Write questions about the colour that feature files show; return the arguments of a run on them."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        records = []
        for index in range(examples):
            colour = index % len(COLOURS)
            regions = 1 + index % 4
            features = random.normal(size=(regions, 6)).astype(np.float32)
            features[:, colour] += 4
            name = f"{split}{index}.npz"
            np.savez(folder / name, features=features, boxes=np.tile(np.float32([0, 0, 1, 1]), (regions, 1)))
            record = {"question": "which colour is it?", "features": name, "answer": COLOURS[colour]}
            records.append(record if split == "train" else {"id": f"{split}-{index}", **record})
        write(folder / f"{split}.jsonl", records)
    return [
        *SHAPES[:2],
        "dataset=jsonl",
        *(f"dataset.{split}={folder / split}.jsonl" for split in ("train", "val", "test")),
        *(arg for arg in SHAPES if arg.startswith(("batch", "logging", "training"))),
        "optimizer.lr=0.05",
        "device=cpu",
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write a JSON-lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def seal(checkpoint: Path, file: str, name: str = "manifest.json") -> None:
    """Make a checkpoint's manifest agree with a file that was changed."""
    manifest = json.loads((checkpoint / name).read_text())
    manifest["files"][file] = {"size": (checkpoint / file).stat().st_size, "sha256": sha256(checkpoint / file)}
    (checkpoint / name).write_text(json.dumps(manifest))


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def save_evil(path: Path, mark: Path) -> None:
    """Write a file of ``torch.save`` that makes the file ``mark`` when everything in it is loaded."""
    torch.save({"words.weight": torch.zeros(5, 8), "code": _Touch(mark)}, path)
