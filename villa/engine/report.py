"""Results of a finished training run: test scores, predictions, ``metrics.json``, curves and a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from villa.analysis.robustness import interval
from villa.checkpoints.layout import CURVES, LOG, METRICS
from villa.checkpoints.store import CheckpointStore
from villa.config.schema import RunConfig
from villa.datasets.base import Split, TaskDataset
from villa.datasets.samplers import Sampler
from villa.engine.answers import Collector, answer_file, submission_path, write_answers, write_submission
from villa.engine.evaluator import Ran
from villa.engine.loop import Training
from villa.engine.schedules import Schedule
from villa.engine.setup import Parts
from villa.errors import DataError
from villa.evaluation.figures import plot_curves
from villa.evaluation.groups import GroupMetric
from villa.evaluation.results import EvaluationProtocol, Result, print_results, print_table, write_metrics
from villa.hub.source import load_model
from villa.progress import track
from villa.provenance import provenance
from villa.registry import SCHEDULERS
from villa.streams import visible
from villa.tracking import Trackers


def report(parts: Parts, training: Training, store: CheckpointStore, trackers: Trackers, folder: Path) -> None:
    """Test the best checkpoint (the last one without validation) and write all results."""
    progress, evaluation = training.progress, parts.config.evaluation
    split, update = evaluation.test_split, progress.best_update or progress.update
    parts.strategy.processes.barrier()  # rank 0 may still be writing a checkpoint
    if update != progress.update:
        load_model(parts.model, store.load(update), parts.strategy, averaged=True)
    with training.updater.averaged() if update == progress.update else nullcontext():
        values = _test(parts, folder)
    if not parts.strategy.processes.is_main:
        return
    results = {} if progress.best is None else {str(evaluation.split): {evaluation.monitor: progress.best}}
    references: Mapping[str, float] = {}
    if values:
        trackers.log(progress.update, "test", values)
        results[split], references = values, parts.data.reference_scores(split)
    chosen = "last" if progress.best_update is None else "best"
    write_metrics(folder / METRICS, results, protocol(parts, update, chosen))
    curves = folder / CURVES if parts.config.logging.figures else None
    if curves is not None:
        plot_curves(folder / LOG, curves, references)
    if values:
        result = Result(
            parts.config.trainer.name,
            values,
            updates=progress.update,
            seconds=training.seconds + training.stream.waited,
            cost=parts.config.training.passes()
            * training.updater.trainer.relative_cost(parts.config.dataset.objectives()),
        )
        show(parts, [result], references, title=f"{parts.config.name}: {split}")
    files = [_predictions(folder, split), submission_path(parts.data, split, folder), curves]
    written = [path for path in files if path and path.exists()]
    for path in written:
        trackers.add(path)
    names = ", ".join([METRICS, *(path.name for path in written), LOG])
    print(f"written to {folder}: {names}, checkpoints of the best and last")


def score(parts: Parts, split: str, examples: Split, folder: Path) -> dict[str, float]:
    """Evaluate a split and write its predictions in the same pass.

    Raises:
        DataError: the split has no targets.
    """
    batches, count = parts.evaluation_batches(examples)
    shown = track(batches, split, count, mode=parts.config.logging.progress)
    collect = Collector(parts, examples)
    with answer_file(parts, _predictions(folder, split)) as write:

        def each(ran: Ran) -> None:
            write(*collect(ran))

        values = parts.evaluator.evaluate(shown, each)
    _submit(parts, split, folder)
    return values


def _test(parts: Parts, folder: Path) -> dict[str, float]:
    """Score the test split; if it has no answers, only predict and return no scores."""
    split = parts.config.evaluation.test_split
    if split not in parts.data.splits():
        print(f"dataset '{parts.config.dataset.name}' has no {split} split: nothing is tested")
        return {}
    examples = parts.data.split(split)
    if len(examples) and not examples.answered:
        print(f"the {split} split has no answers: it gets predictions, but no scores")
        write_answers(parts, examples, _predictions(folder, split))
        _submit(parts, split, folder)
        return {}
    for warning in about_split(split, examples):
        print(f"note: {warning}")
    return score(parts, split, examples, folder)


def about_split(name: str, examples: Split) -> list[str]:
    """Return notes for the user about a split, one line each."""
    return [f"{name}: {warning}" for warning in examples.warnings()]


def _submit(parts: Parts, split: str, folder: Path) -> None:
    """Write the submission file; if the predictions are unsuitable, keep them and print why."""
    if not parts.strategy.processes.is_main:
        return
    try:
        write_submission(parts.data, split, _predictions(folder, split))
    except DataError as error:
        print(f"no submission file: {error}", flush=True)


def _predictions(folder: Path, split: str) -> Path:
    return folder / f"predictions_{split}.jsonl"


def protocol(parts: Parts, update: int, chosen: str) -> EvaluationProtocol:
    """Return everything that the scores depend on."""
    return EvaluationProtocol(
        data=parts.data.fingerprint(),
        update=update,
        seed=parts.config.seed,
        provenance=provenance(),
        checkpoint=chosen,
    )


def show(parts: Parts, results: list[Result], references: Mapping[str, float], *, title: str) -> None:
    """Print the result table, led by the recipe's first metric among the results, and that of groups and subsets."""
    metrics = parts.config.evaluation.metrics
    metric = next((name for name in metrics if all(name in result.metrics for result in results)), "loss")
    print_results(results, references, metric=metric, title=title)
    of_groups = {name: one for name, one in parts.evaluator.metrics.items() if isinstance(one, GroupMetric)}
    known = [one for one in of_groups.values() if one.clusters()]
    if known:
        print_table(group_table(known, f"{title}, groups and subsets"))
    for name in [name for name, one in of_groups.items() if one not in known]:
        print(f"note: '{name}' has no value, because no example has what it is about (docs/benchmarks.md)")


def group_table(metrics: Sequence[GroupMetric], title: str) -> Table:
    """Return a table of every value, with a 95 % interval by a bootstrap over groups (or single examples)."""
    table = Table(title=Text(visible(title)), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for heading in ("%", "95 % interval", "groups"):
        table.add_column(heading, justify="right")
    for metric in metrics:
        clusters = metric.clusters()
        for name, value in metric.compute().items():
            cells: list[str] = []
            if (found := clusters.get(name)) is not None:
                low, high = interval(found.means, weights=found.sizes)
                cells = [f"[{100 * low:.1f}, {100 * high:.1f}]", f"{len(found.sizes):,}"]
            table.add_row(Text(visible(name.replace("_", " "))), f"{100 * value:.1f}", *cells)
    return table


def data_line(config: RunConfig, data: TaskDataset, read: Mapping[str, Split]) -> str:
    """Return the size of the data: ``easy_vqa: 34,717 train and 3,858 val examples of 13 labels (splits: ...)``.

    Args:
        config: the recipe.
        data: its data.
        read: the splits that the run has opened, by name.
    """
    counts = " and ".join(f"{len(split):,} {name}" for name, split in read.items())
    labels = data.facts().num_labels
    of = "" if labels is None else f" of {labels:,} label{'s' * (labels != 1)}"
    return f"{config.dataset.name}: {counts} examples{of} (splits: {', '.join(data.splits())})"


def wrapped(text: str, indent: str = "") -> str:
    """Return a line of a run's header, wrapped between words at 80 columns."""
    wrapper = textwrap.TextWrapper(80, indent, f"{indent}  ", break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)


def warnings_of_run(config: RunConfig, split: Split, sampler: Sampler, updates: int) -> list[str]:
    """Return warnings about a run whose recipe has effects that a user may not expect, one line each.

    Args:
        config: the recipe.
        split: the training split.
        sampler: cuts the split into updates.
        updates: number of updates of the run.
    """
    schedule: Schedule = SCHEDULERS.get(config.scheduler.name)(config.scheduler, updates)
    found = (*about_split("train", split), *sampler.warnings(), *schedule.warnings(config.optimizer.lr, updates))
    return list(dict.fromkeys(found))
