"""Results of a finished training run: test scores, predictions, ``metrics.json``, curves and a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from villa.analysis.failures import Failure, failures_figure, failures_page
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
from villa.evaluation.figures import plot_curves, write_figure
from villa.evaluation.groups import GroupMetric
from villa.evaluation.metrics import MeanScore
from villa.evaluation.results import EvaluationProtocol, Result, Tally, print_results, print_table, write_metrics
from villa.files import atomic_write
from villa.hub.source import load_model
from villa.progress import track
from villa.provenance import provenance
from villa.registry import SCHEDULERS
from villa.streams import visible
from villa.tracking import Trackers

#: The page of the worst predictions, and a figure of some of them.
FAILURES, FAILURES_FIGURE = "failures.html", "failures.png"


def report(parts: Parts, training: Training, store: CheckpointStore, trackers: Trackers, folder: Path) -> None:
    """Test the best checkpoint (the last one without validation) and write all results."""
    progress, evaluation = training.progress, parts.config.evaluation
    split, update = evaluation.test_split, progress.best_update or progress.update
    parts.strategy.processes.barrier()  # rank 0 may still be writing a checkpoint
    if update != progress.update:
        load_model(parts.model, store.load(update), parts.strategy, averaged=True)
    with training.updater.averaged() if update == progress.update else nullcontext():
        scored = _test(parts, folder)
    if not parts.strategy.processes.is_main:
        return
    results = {} if progress.best is None else {str(evaluation.split): {evaluation.monitor: progress.best}}
    references: Mapping[str, float] = {}
    if scored is not None:
        trackers.log(progress.update, "test", scored.values)
        results[split], references = scored.values, scored.references(parts, split)
    chosen = "last" if progress.best_update is None else "best"
    tested = {} if scored is None else {split: scored}
    write_metrics(folder / METRICS, results, protocol(parts, update, chosen, tested))
    curves = folder / CURVES if parts.config.logging.figures else None
    if curves is not None:
        n = "" if scored is None else f"; n = {scored.tally.count:,} {split} examples"
        title = f"{parts.config.name}: {parts.config.trainer.name}, seed {parts.config.seed}"
        caption = f"training values: means of {parts.config.logging.every} updates{n}"
        plot_curves(folder / LOG, curves, references, title=title, caption=caption)
    if scored is not None:
        result = Result(
            parts.config.trainer.name,
            scored.values,
            interval=scored.interval,
            updates=progress.update,
            seconds=training.seconds + training.stream.waited,
            cost=parts.config.training.passes()
            * training.updater.trainer.relative_cost(parts.config.dataset.objectives()),
        )
        show(parts, [result], references, title=scored.title(parts, split))
    files = [_predictions(folder, split), submission_path(parts.data, split, folder), curves]
    files += [folder / name for name in (FAILURES, FAILURES_FIGURE)]
    written = [path for path in files if path and path.exists()]
    for path in written:
        trackers.add(path)
    names = ", ".join([METRICS, *(path.name for path in written), LOG])
    print(f"written to {folder}: {names}, checkpoints of the best and last")


@dataclass(frozen=True)
class Scored:
    """The scores of a split.

    Attributes:
        values: values by name.
        tally: what its predictions add up to; empty above rank 0.
        interval: 95 % bootstrap interval over examples of the first metric, if that is a mean over examples.
    """

    values: dict[str, float]
    tally: Tally
    interval: tuple[float, float] | None

    def references(self, parts: Parts, split: str) -> dict[str, float]:
        """Return the scores of trivial answers: those that the data know, and the most frequent answer's."""
        majority = self.tally.majority() if _first(parts) in ("accuracy", "soft_accuracy") else None
        return {**({} if majority is None else {"majority": majority}), **parts.data.reference_scores(split)}

    def title(self, parts: Parts, split: str) -> str:
        """Return the title of a table: the run, the split and the number of examples."""
        return f"{parts.config.name}: {split}, n = {self.tally.count:,}"


def _first(parts: Parts) -> str:
    return next(iter(parts.evaluator.metrics), "loss")


def score(parts: Parts, split: str, examples: Split, folder: Path) -> Scored:
    """Evaluate a split; write its predictions in the same pass, and a page of the worst ones.

    Raises:
        DataError: the split has no targets.
    """
    batches, count = parts.evaluation_batches(examples)
    shown = track(batches, split, count, mode=parts.config.logging.progress)
    metric = parts.evaluator.metrics.get(_first(parts))
    collect = Collector(parts, examples, metric if isinstance(metric, MeanScore) else None)
    tally = Tally()
    with answer_file(parts, _predictions(folder, split)) as write:

        def each(ran: Ran) -> None:
            ids, answers = collect(ran)
            write(ids, answers)
            tally.add(ids, answers)

        values = parts.evaluator.evaluate(shown, each)
    _submit(parts, split, folder)
    if parts.strategy.processes.is_main:
        _write_failures(parts, split, examples, tally, folder)
    each_scored = 0 < len(tally.correct) == tally.count
    return Scored(values, tally, interval(tally.correct) if each_scored else None)


def _write_failures(parts: Parts, split: str, examples: Split, tally: Tally, folder: Path) -> None:
    """Write the page of the worst predictions, and a figure of some of them, if there are wrong ones."""
    failures = [Failure(id_, told, examples.shown_image(index)) for index, id_, told in tally.failures()]
    if not failures:
        return
    wrong = sum(share < 1 for share in tally.correct)
    title = f"{parts.config.name}: {split}, the worst {len(failures)} of {wrong:,} wrong among {tally.count:,} examples"
    atomic_write(folder / FAILURES, failures_page(failures, title))
    if parts.config.logging.figures:
        write_figure(failures_figure(failures, title), folder / FAILURES_FIGURE)


def _test(parts: Parts, folder: Path) -> Scored | None:
    """Score the test split; if it has no answers, only predict and return None."""
    split = parts.config.evaluation.test_split
    if split not in parts.data.splits():
        print(f"dataset '{parts.config.dataset.name}' has no {split} split: nothing is tested")
        return None
    examples = parts.data.split(split)
    if len(examples) and not examples.answered:
        print(f"the {split} split has no answers: it gets predictions, but no scores")
        write_answers(parts, examples, _predictions(folder, split))
        _submit(parts, split, folder)
        return None
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


def protocol(parts: Parts, update: int, chosen: str, scored: Mapping[str, Scored] | None = None) -> EvaluationProtocol:
    """Return everything that the scores of splits depend on."""
    scored = scored or {}
    return EvaluationProtocol(
        recipe=parts.config.name,
        method=parts.config.trainer.name,
        examples={split: found.tally.count for split, found in scored.items()},
        intervals={split: {_first(parts): found.interval} for split, found in scored.items() if found.interval},
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
