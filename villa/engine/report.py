"""What a finished training run leaves: test scores, predictions, ``metrics.json``, curves and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from villa.datasets.stream import evaluation_batches
from villa.engine.checkpoint import CheckpointStore
from villa.engine.folder import CURVES, LOG, METRICS
from villa.engine.progress import Display
from villa.engine.provenance import provenance
from villa.engine.setup import Parts
from villa.engine.tracking import Trackers
from villa.engine.training import Training
from villa.evaluation.figures import plot_curves
from villa.evaluation.predictions import PredictionWriter
from villa.evaluation.results import EvaluationProtocol, Result, print_results, write_metrics


def report(parts: Parts, training: Training, store: CheckpointStore, trackers: Trackers, folder: Path) -> None:
    """Test the best checkpoint (the last one where there was no validation), and write everything down."""
    progress, split = training.progress, parts.config.evaluation.test_split
    if split not in parts.data.splits():
        print(f"dataset '{parts.config.dataset.name}' has no {split} split: nothing is tested")
        return
    update = progress.best_update or progress.update
    if update != progress.update:
        load_model(parts.model, store.load(update))
    values = score(parts, split, folder / f"predictions_{split}.jsonl")
    trackers.log(progress.update, "test", values)
    references = parts.data.reference_scores(split)
    chosen = "last" if progress.best_update is None else "best"
    results = {split: values} | (
        {} if progress.best is None else {"val": {parts.config.evaluation.monitor: progress.best}}
    )
    write_metrics(folder / METRICS, results, protocol(parts, update, chosen))
    plot_curves(folder / LOG, folder / CURVES, references)
    result = Result(
        parts.config.trainer.name,
        values,
        updates=progress.update,
        seconds=training.seconds + training.stream.waited,
        cost=training.updater.trainer.relative_cost(),
    )
    show(parts, [result], references, title=f"{parts.config.name}: {split}")
    print(
        f"written to {folder}: {METRICS}, predictions_{split}.jsonl, {CURVES}, {LOG}, checkpoints of the best and last"
    )


def score(parts: Parts, split: str, predictions: Path) -> dict[str, float]:
    """Evaluate a split and write its predictions in the same pass.

    Raises:
        DataError: the split has no targets.
    """
    evaluation, examples = parts.config.evaluation, parts.data.split(split)
    batches = evaluation_batches(examples, parts.data.collate, evaluation.examples, parts.config.training.workers)
    total = -(-len(examples) // evaluation.examples)
    display = Display(parts.config.logging.progress)
    with PredictionWriter(predictions) as writer:
        return parts.evaluator.evaluate(
            display.track(batches, split, total),
            lambda batch, output: writer.write(batch.ids, parts.data.decode(output.logits.float())),
        )


def protocol(parts: Parts, update: int, chosen: str) -> EvaluationProtocol:
    """What the scores depend on."""
    return EvaluationProtocol(
        data=parts.data.fingerprint(),
        update=update,
        seed=parts.config.seed,
        provenance=provenance(),
        checkpoint=chosen,
    )


def show(parts: Parts, results: list[Result], references: Mapping[str, float], *, title: str) -> None:
    """Print the result table under the first metric of the recipe."""
    metric = next(iter(parts.config.evaluation.metrics), "loss")
    print_results(results, references, metric=metric, title=title)
