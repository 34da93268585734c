"""Building the objects of a run from its recipe."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from villa.batch import Batch
from villa.checkpoints.files import Checkpoint
from villa.checkpoints.layout import CHECKPOINTS, MANIFEST
from villa.checkpoints.load_report import LoadReport
from villa.checkpoints.store import resolve
from villa.config.schema import BatchConfig, RunConfig
from villa.datasets.base import Split, TaskDataset
from villa.datasets.own.assets import assets_beside, facts_beside
from villa.datasets.stream import StandIn, evaluation_batches, evaluation_plan
from villa.distributed.strategy import Strategy, choose_device, strategy_of
from villa.engine.evaluator import Evaluator
from villa.engine.passes import Precision
from villa.errors import ConfigError, nearest, one_line
from villa.facts import Written
from villa.files import local_path
from villa.hub.opening import saved_on_hub
from villa.losses.base import Loss
from villa.models.base import Model, ModelOutput
from villa.models.dropout import draw_fast
from villa.models.matching import Matching
from villa.registry import DATASETS, LOSSES, METRICS, MODELS, TRAINERS
from villa.rng import seed_pass
from villa.trainers.base import Trainer

#: torch's messages when memory runs out or a size overflows.
_NO_MEMORY = re.compile("allocate|out of memory|size calculation overflow", re.IGNORECASE)


@dataclass(frozen=True)
class Parts:
    """The objects that every run type needs.

    Attributes:
        config: the recipe.
        data: the task's data.
        model: the model, on its device.
        loss: the task loss.
        precision: device, autocast and loss scaling.
        evaluator: scores batches.
        strategy: how processes share the work; applied by ``distribute``.
    """

    config: RunConfig
    data: TaskDataset
    model: Model
    loss: Loss
    precision: Precision
    evaluator: Evaluator
    strategy: Strategy
    _plans: WeakKeyDictionary[Split, dict[bool, list[Sequence[int]]]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def distribute(self) -> None:
        """Distribute the model, with its weights loaded, over the processes of the run.

        Raises:
            ConfigError: the strategy does not support the model, or there are several processes for a single one.
        """
        self.strategy.connect()
        self.strategy.apply(self.model)

    def evaluation_plan(self, split: Split, *, first: bool = False) -> list[Sequence[int]]:
        """Return the examples of every batch in which a split is evaluated.

        Examples of similar length go together, unless the loss compares the examples of a batch with each other.

        Args:
            split: the examples.
            first: return only the first batch, or the first of each part of a mixture.
        """
        plans = self._plans.setdefault(split, {})
        if first not in plans:
            size = self.config.evaluation.examples
            plans[first] = evaluation_plan(split, size, first=first, by_length=self._by_length)
        return plans[first]

    def evaluation_batches(
        self, split: Split, *, first: bool = False, start: int = 0
    ) -> tuple[Iterator[Batch | StandIn], int]:
        """Return this process's batches of a split, as planned, and their number; see ``evaluation_plan``.

        Args:
            split: the examples.
            first: see ``evaluation_plan``.
            start: number of batches of the plan to leave out.
        """
        config, share, plan = self.config, self.strategy.share, self.evaluation_plan(split, first=first)
        batches = evaluation_batches(
            split,
            self.data.collate,
            config.evaluation.examples,
            config.training.workers,
            start=start,
            plan=plan,
            share=share,
            timeout=config.training.data_timeout,
        )
        return batches, len(share.turns(len(plan) - start))

    @property
    def _by_length(self) -> bool:
        return not self.loss.compares_examples(self.config.dataset.objectives())

    def prepare(self, batch: Batch) -> Batch:
        """Move a training micro-batch to the device and let the data set select among its candidates."""
        moved = batch.to(self.precision.device)
        return self.data.refine(moved, lambda given: next(self.evaluator.predict([given])).output.logits)

    def decode(self, batch: Batch, output: ModelOutput) -> list[dict[str, Any]]:
        """Decode a batch's output into B answers ``{"answer": ..., "score": ...}``; see ``TaskDataset.decode``."""
        predictions = self.evaluator.predictions(batch, output)
        if isinstance(predictions, Written):
            return self.data.decode_written(predictions, batch)
        return self.data.decode(predictions, batch)

    def save_assets(self, folder: Path) -> None:
        """Write the files that a checkpoint needs besides its weights."""
        self.data.save_assets(folder)
        self.model.save_assets(folder)

    def split(self, name: str, option: str) -> Split:
        """Return the split named by a recipe's ``option``.

        Raises:
            ConfigError: the data set has no such split.
            DataError: its files cannot be used.
        """
        known = self.data.splits()
        if name not in known:
            raise ConfigError(
                f"{option} is '{name}', but dataset '{self.config.dataset.name}' has only the splits "
                f"{', '.join(known) or '(none)'}{nearest(name, known)}; name one of these, or add the data of '{name}'"
            )
        return self.data.split(name)


def build(config: RunConfig, assets: Path | None = None) -> Parts:
    """Build data, model, loss and metrics.

    Args:
        config: the recipe.
        assets: vocabulary and labels saved with a checkpoint; None builds them from the data.

    Raises:
        VillaError: the recipe, the data or the weights do not fit together.
    """
    device = choose_device(config.device)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    data: TaskDataset = DATASETS.get(config.dataset.name)(config.dataset, assets=assets)
    seed_pass(config.seed, 0, 0, 0)  # initial weights are drawn as update 0
    with within_memory(config.model.name):
        model = _build_model(config, data, assets)
    if getattr(config.dataset, "label_prompt", None) is not None and not model.scores_label_texts():
        raise ConfigError(
            f"dataset.label_prompt has no effect: model '{config.model.name}' does not score images against texts; "
            "leave it out, or use a dual encoder (model.name=huggingface)"
        )
    loss: Loss = LOSSES.get(config.loss.name)(config.loss)
    metrics = {name: METRICS.get(name)() for name in config.evaluation.metrics}
    precision = Precision(config.training.precision, device)
    draw_fast(model)
    model.to(device)
    strategy = strategy_of(config.distributed)
    evaluator = Evaluator(model, loss, metrics, precision, strategy)
    return Parts(config, data, model, loss.to(device), precision, evaluator, strategy)


@contextmanager
def within_memory(model: str) -> Iterator[None]:
    """Report in one line that a model being built does not fit into memory.

    Raises:
        ConfigError: there is not enough memory, or a size exceeds 64 bits.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        raise ConfigError(
            f"model '{model}' needs more memory than there is ({one_line(error):.160}); lower the sizes in model.*"
        ) from error


def _build_model(config: RunConfig, data: TaskDataset, assets: Path | None) -> Model:
    """Build the model with fresh weights or those of ``model.checkpoint``; a run's checkpoint is loaded afterwards."""
    kind: type[Model] = MODELS.get(config.model.name)
    if assets is not None:
        return kind.restore(config.model, data.facts(), assets)
    if config.model.checkpoint is None:
        return kind.from_config(config.model, data.facts())
    given = saved_on_hub(config.model.checkpoint) or local_path(config.model.checkpoint)
    source = str(resolve(given) if (given / CHECKPOINTS).is_dir() else given)
    beside = assets_beside(source)
    carried = None if beside is None else data.carry(beside)
    facts = data.facts()
    matching = Matching(source, facts_beside(source), facts)
    model = kind.from_config(replace(config.model, checkpoint=source), facts)
    report = _loaded(model, source, matching)
    notes = [] if carried is None else [carried]
    kept = os.path.join(source, MANIFEST)  # noqa: PTH118 (a source may be a URL, whose name pathlib may not take)
    if os.path.isfile(kept) and Checkpoint(Path(source), 0).averaged:  # noqa: PTH113
        notes.append("they are the running average of its weights; its model.safetensors has the last ones")
    rows = (*report.rows, *notes)
    print(replace(report, rows=rows, reading=matching.reading()))
    return model


def _loaded(model: Model, source: str, matching: Matching) -> LoadReport:
    """Load weights, with rows matched by the data's names if the model supports that."""
    if "matching" in inspect.signature(model.load_weights).parameters:
        return model.load_weights(source, matching)
    report = model.load_weights(source)
    return replace(report, rows=(*report.rows, "rows are taken as they are: the model's own load_weights has no names"))


def build_trainer(config: RunConfig, model: Model) -> Trainer:
    """Build the adversarial method; check that the model has the perturbation points that it needs.

    Raises:
        ConfigError: the method, or noise on its clean passes, perturbs a modality that the model does not have.
    """
    trainer: Trainer = TRAINERS.get(config.trainer.name)(config.trainer)
    noise, points = config.training.noise.sizes(), model.perturbation_points()
    trainer.stochastic, trainer.noisy = model.stochastic(), bool(noise)
    for modality in noise.keys() - points.keys():
        raise ConfigError(
            f"training.noise.{modality} is {noise[modality]:g}, but model '{config.model.name}' has no {modality} that "
            "could get noise; set it to null"
        )
    missing = [modality for modality in trainer.modalities() if modality not in points]
    if missing:
        possible = f"{' and '.join(points)} only" if points else "nothing"
        advice = "set trainer.modality accordingly" if points else "use standard or rdrop, or perturb its weights"
        raise ConfigError(
            f"trainer '{config.trainer.name}' perturbs {' and '.join(missing)}, but model '{config.model.name}' can "
            f"be perturbed in {possible}; {advice}"
        )
    trainer.check(model)
    return trainer


def batch_of_processes(batch: BatchConfig, world_size: int, *, compares_examples: bool = False) -> BatchConfig:
    """Return the batch options, divided evenly over the processes if the recipe leaves the micro-batches open.

    Args:
        batch: the recipe's ``batch`` section.
        world_size: number of processes.
        compares_examples: whether the loss compares the examples of a micro-batch with each other.

    Raises:
        ConfigError: the gradient depends on the number of micro-batches, and the recipe leaves it open.
    """
    size = batch.examples or batch.tokens
    if world_size == 1 or batch.per_pass is not None or size is None:
        return batch
    reason = None
    if batch.accumulation == "sum":
        reason = "batch.accumulation=sum adds up one mean for each micro-batch, so that their number"
    elif compares_examples:
        reason = "the loss compares the examples of a micro-batch with each other, so that their number"
    if reason is not None:
        raise ConfigError(
            f"{reason} must be told on {world_size} processes: give batch.per_pass, the largest part of an update "
            "that goes through the model at once"
        )
    return replace(batch, per_pass=math.ceil(size / world_size))


def idle_note(batch: BatchConfig, world_size: int) -> list[str]:
    """Return a note if an update has fewer micro-batches than there are processes."""
    size = batch.examples or batch.tokens or 1
    count = math.ceil(size / min(batch.per_pass or size, size))
    if count >= world_size:
        return []
    return [
        f"an update is {count} micro-batch{'es' * (count > 1)}, so that {world_size - count} of {world_size} processes "
        f"have nothing of their own to do: lower batch.per_pass to {max(1, size // world_size)}"
    ]
