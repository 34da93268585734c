"""``run_type=val``, ``test`` and ``predict``, and the Python API: a trained checkpoint at work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from villa.config.printer import to_yaml
from villa.config.schema import RunConfig
from villa.datasets.base import Split
from villa.datasets.stream import evaluation_batches
from villa.engine.checkpoint import Checkpoint, load, resolve
from villa.engine.folder import CONFIG, METRICS, claim
from villa.engine.progress import track
from villa.engine.report import protocol, score, show
from villa.engine.setup import Parts, build
from villa.errors import CheckpointError, ConfigError, DataError
from villa.evaluation.predictions import PredictionWriter
from villa.evaluation.results import Result, write_metrics
from villa.files import atomic_write, local_path
from villa.plugins import one_line


def restore_parts(config: RunConfig) -> tuple[Parts, Checkpoint]:
    """Build the parts of a run with the weights, vocabulary and labels of ``checkpoint.path``.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another model.
    """
    if config.checkpoint.path is None:
        raise ConfigError(f"run_type={config.run_type} needs checkpoint.path; give a run folder or a checkpoint")
    checkpoint = load(resolve(local_path(config.checkpoint.path)))
    parts = build(config, assets=checkpoint.assets)
    try:
        parts.model.load_state_dict(checkpoint.model_state())
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint '{checkpoint.path}' is of another model: {one_line(error)}") from error
    return parts, checkpoint


def evaluate(config: RunConfig) -> int:
    """Score a split with a checkpoint: a table, ``metrics.json`` and predictions in ``output_dir``."""
    split = config.evaluation.test_split if config.run_type == "test" else config.evaluation.split or "val"
    parts, checkpoint = restore_parts(config)
    with claim(Path(config.output_dir), resume=False) as folder:
        values = score(parts, split, folder / f"predictions_{split}.jsonl")
        write_metrics(folder / METRICS, {split: values}, protocol(parts, checkpoint.update, "given"))
        atomic_write(folder / CONFIG, to_yaml(config))
    result = Result(config.trainer.name, values, updates=checkpoint.update)
    show(parts, [result], parts.data.reference_scores(split), title=f"{config.name}: {split}")
    print(f"written to {folder}")
    return 0


def predict(config: RunConfig) -> int:
    """Write predictions for a split, or for the records of ``predict.input``."""
    parts, _ = restore_parts(config)
    given = config.predict.input
    stem = config.predict.split if given is None else Path(given).stem
    output = Path(config.predict.output or Path(config.output_dir) / f"predictions_{stem}.jsonl")
    if output.exists():
        raise ConfigError(f"'{output}' exists; move it away or give another predict.output")
    if given is None:
        examples = parts.data.split(config.predict.split)
    else:
        examples = parts.data.requests(read_requests(local_path(given)))
    with PredictionWriter(output) as writer:
        for ids, answers in answer(parts, examples):
            writer.write(ids, answers)
    print(f"{len(examples)} predictions written to {output}")
    return 0


def answer(parts: Parts, examples: Split) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yield the ids and decoded answers of the examples, batch by batch."""
    size = parts.config.evaluation.examples
    batches = evaluation_batches(examples, parts.data.collate, size, parts.config.training.workers)
    total = -(-len(examples) // size)
    for batch, output in parts.evaluator.predict(track(batches, "predict", total, mode=parts.config.logging.progress)):
        yield batch.ids, parts.data.decode(output.logits.float())


def read_requests(path: Path) -> Sequence[Mapping[str, Any]]:
    """Read a JSON-lines file of records; paths of images in it are relative to the file.

    Raises:
        DataError: the file is missing, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"predict.input '{path}' cannot be read: {one_line(error)}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {one_line(error)}") from error
        if not isinstance(record, dict):
            raise DataError(f'{path}:{number} is not an object; each line is {{"image": path, "question": text}}')
        records.append({"id": str(number), **record})
    return records
