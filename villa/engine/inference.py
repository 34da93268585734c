"""``run_type=val``, ``test`` and ``predict``: evaluation and prediction with a trained checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from villa.checkpoints.layout import CONFIG, METRICS
from villa.config.printer import to_yaml
from villa.config.schema import RunConfig
from villa.datasets.own.records import JsonLines, Request, beside, record_id
from villa.distributed.strategy import strategy_of
from villa.engine.answers import submission_path, write_answers, write_submission
from villa.engine.report import about_split, protocol, score, show
from villa.engine.run_folder import claim
from villa.engine.setup import Parts, build
from villa.errors import ConfigError, DataError, StorageError, about, one_line
from villa.evaluation.results import Result, write_metrics
from villa.files import atomic_write, local_path
from villa.hub.opening import open_source
from villa.hub.source import Source


def restore_parts(config: RunConfig, *, fresh: bool = False) -> tuple[Parts, Source]:
    """Build the parts of a run with the weights, vocabulary and labels of ``checkpoint.path``.

    Args:
        config: the recipe.
        fresh: keep fresh weights, as a control.

    Raises:
        CheckpointError: the trained model is missing, damaged or of another kind.
    """
    assert config.checkpoint.path is not None, "the configuration was not validated"
    source = open_source(config.checkpoint.path, config.checkpoint.weights)
    with source.assets() as assets:
        parts = build(config, assets=assets)
    if not fresh:
        source.load_into(parts.model)
    return parts, source


def evaluate(config: RunConfig) -> int:
    """Score a split with a checkpoint; write a table, ``metrics.json`` and predictions to ``output_dir``."""
    tests = config.run_type == "test"
    split = config.evaluation.test_split if tests else str(config.evaluation.split)
    processes = strategy_of(config.distributed).connect()
    with claim(Path(config.output_dir), resume=False, trains=False, processes=processes) as folder:
        parts, source = restore_parts(config)
        parts.distribute()
        examples = parts.split(split, "evaluation.test_split" if tests else "evaluation.split")
        for warning in about_split(split, examples):
            print(f"note: {warning}")
        values = score(parts, split, examples, folder)
        if not processes.is_main:
            return 0
        write_metrics(folder / METRICS, {split: values}, protocol(parts, source.update, "given"))
        atomic_write(folder / CONFIG, to_yaml(config))
    result = Result(config.trainer.name, values, updates=source.update)
    show(parts, [result], parts.data.reference_scores(split), title=f"{config.name}: {split}")
    print(f"written to {folder}")
    return 0


def predict(config: RunConfig) -> int:
    """Write predictions for a split, or for the records of ``predict.input``."""
    given = config.predict.input
    processes = strategy_of(config.distributed).connect()
    stem = config.predict.split if given is None else Path(given).stem
    output = Path(config.predict.output or Path(config.output_dir) / f"predictions_{stem}.jsonl")
    if output.exists():
        raise ConfigError(f"'{output}' exists; move it away or give another predict.output")
    processes.barrier()  # every process has checked before the file is created
    parts, _ = restore_parts(config)
    parts.distribute()
    submission = submission_path(parts.data, config.predict.split, output.parent) if given is None else None
    if submission is not None and submission.exists():
        raise ConfigError(f"'{submission}' exists; move it away or give another predict.output")
    if given is None:
        examples = parts.split(config.predict.split, "predict.split")
    else:
        examples = parts.data.requests(list(read_requests(local_path(given))))
    for warning in about_split(stem, examples):
        print(f"note: {warning}")
    try:
        write_answers(parts, examples, output)
    except StorageError:
        raise
    except OSError as error:
        raise ConfigError(f"'{output}' cannot be written: {one_line(error)}; give another predict.output") from error
    if not processes.is_main:
        return 0
    print(f"{len(examples)} predictions written to {output}")
    if submission is not None:
        write_submission(parts.data, config.predict.split, output)
        print(f"submission file written to {submission}")
    return 0


def read_requests(path: Path) -> Iterator[Request]:
    """Yield the records of a JSON-lines file, each with an ``id`` (the line number by default).

    A relative path of an image or feature file is resolved against the file's folder if it exists there; otherwise it
    is left for the data set to resolve.

    Raises:
        DataError: the file is missing or empty, a line is not a JSON object, or an id is unusable or occurs twice.
    """
    lines = JsonLines(path)
    ids: set[str] = set()
    for index, record in enumerate(lines):
        where = lines.where(index)
        with about(where):
            name = record_id(record, str(lines.number(index)))
        if name in ids:
            raise DataError(f"{where}: the id '{name}' occurs twice; give every line its own, or none an id")
        ids.add(name)
        yield Request({**record, **beside(path.parent, record), "id": name}, where)
