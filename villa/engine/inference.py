"""``run_type=val`` and ``test``: evaluation with a trained checkpoint."""

from __future__ import annotations

from pathlib import Path

from villa.checkpoints.layout import CONFIG, METRICS
from villa.config.printer import to_yaml
from villa.config.schema import RunConfig
from villa.distributed.strategy import strategy_of
from villa.engine.report import about_split, protocol, score, show
from villa.engine.run_folder import claim
from villa.engine.setup import Parts, build
from villa.evaluation.results import Result, write_metrics
from villa.files import atomic_write
from villa.hub.opening import open_model
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
    source = open_model(config.checkpoint.path, config.checkpoint.weights)
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
        scored = score(parts, split, examples, folder)
        if not processes.is_main:
            return 0
        write_metrics(
            folder / METRICS, {split: scored.values}, protocol(parts, source.update, "given", {split: scored})
        )
        atomic_write(folder / CONFIG, to_yaml(config))
    result = Result(config.trainer.name, scored.values, updates=source.update, interval=scored.interval)
    show(parts, [result], scored.references(parts, split), title=scored.title(parts, split))
    print(f"written to {folder}")
    return 0
