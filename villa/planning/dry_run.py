"""What is told without a run: ``--dry-run`` plans memory and operations, ``--perturbation-points`` lists points."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from villa.config.loader import Loaded, load_stages
from villa.config.schema import RunConfig
from villa.config.validate import TRAINING_RUNS
from villa.datasets.base import Split, TaskDataset
from villa.datasets.names import CENTRED
from villa.datasets.samplers import Sampler, UpdateSampler
from villa.distributed.environment import Place
from villa.distributed.strategy import choose_device
from villa.engine.report import data_line, warnings_of_run, wrapped
from villa.engine.setup import build_trainer, within_memory
from villa.errors import ConfigError, DataError, MissingDataError, VillaError, one_line
from villa.facts import DataFacts
from villa.models.base import Model, Point, summary
from villa.planning.meta import MetaTensors, without_compiler
from villa.planning.plan import Plan, make_plan
from villa.planning.samples import Sample, samples, stretched
from villa.planning.strategies import StrategyName
from villa.registry import DATASETS, MODELS

#: Sizes of UNITER's and VILLA's data, for missing data: BERT's cased vocabulary, the width of the detector's features,
#: and its classes (arXiv 1707.07998; the released databases store 1,601).
VOCABULARY, WIDTH, CLASSES = 28996, 2048, 1601


@dataclass(frozen=True)
class Sizes:
    """Sizes of a made-up example.

    Attributes:
        tokens: tokens of the text.
        regions: regions of each image.
    """

    tokens: int = 20
    regions: int = 40


def dry_run(values: Sequence[str], stages: Sequence[Loaded] | None = None) -> list[str]:
    """Describe in lines what the runs of a recipe will need, without loading or allocating weights.

    Args:
        values: the arguments of ``villa_run``.
        stages: what ``load_stages`` makes of them, if that is known already.

    Raises:
        VillaError: the recipe or the data cannot be used.
    """
    stages, lines = stages or load_stages(values), []
    for number, stage in enumerate(stages):
        if len(stages) > 1:
            lines.append(f"stage {number + 1} of {len(stages)} ({stage.config.name}):")
        plan, notes, source = _plan_recipe(stage.config, values, number)
        if source is not None and stage.config.run_type in TRAINING_RUNS:
            updates = stage.config.training.updates or source.sampler.total_updates(stage.config.training.epochs or 1)
            notes += warnings_of_run(stage.config, source.split, source.sampler, updates)
        data = [] if source is None else [data_line(stage.config, source.data, {"train": source.split})]
        lines += [*map(wrapped, (*data, *plan.lines())), *(wrapped(f"note: {note}", "  ") for note in notes)]
    return lines


def plan_recipe(
    values: Sequence[str],
    stage: int = 0,
    sizes: Sizes | None = None,
    *,
    strategy: StrategyName | None = None,
    processes: int | None = None,
    device: str | None = None,
) -> tuple[Plan, list[str]]:
    """Plan a stage of a recipe with its data or, if that is missing, with made-up examples.

    Args:
        values: the arguments of ``villa_run``.
        stage: index of the stage, from 0.
        sizes: sizes of made-up examples, to be used instead of the data.
        strategy: strategy of parallel training; None uses the recipe's.
        processes: number of processes; None reads ``WORLD_SIZE``.
        device: type of the device, ``cpu`` or ``cuda``; None uses the recipe's.

    Returns:
        The plan, and notes on it.

    Raises:
        VillaError: the recipe or the data cannot be used.
    """
    config = load_stages(values)[stage].config
    return _plan_recipe(config, values, stage, sizes, strategy=strategy, processes=processes, device=device)[:2]


def _plan_recipe(
    config: RunConfig,
    values: Sequence[str],
    stage: int = 0,
    sizes: Sizes | None = None,
    *,
    strategy: StrategyName | None = None,
    processes: int | None = None,
    device: str | None = None,
) -> tuple[Plan, list[str], _Source | None]:
    """Plan a stage like ``plan_recipe``; also return the training data if they were read."""
    notes: list[str] = []
    source = None
    if sizes is None:
        try:
            source = _from_data(config)
            facts, found = source.facts, source.samples
        except MissingDataError as error:
            sizes = Sizes()
            reason = str(error).splitlines()[0].rstrip(":")
            notes.append(f"examples are made up ({sizes.tokens} tokens, {sizes.regions} regions): {reason}")
    if sizes is not None:
        facts, found = _made_up(config, values, stage, sizes)
    model = _on_meta(config, facts)
    build_trainer(config, model)
    chosen, count = _strategy(config)
    kind = device or choose_device(config.device).type
    return _planned(config, model, found, kind, strategy or chosen, processes or count), notes, source


def _on_meta(config: RunConfig, facts: DataFacts) -> Model:
    """Build the recipe's model on the meta device."""
    with _plannable(f"model '{config.model.name}'"), without_compiler(), torch.device("meta"), MetaTensors():
        model: Model = MODELS.get(config.model.name).from_config(config.model, facts)
    return model


@contextmanager
def _plannable(what: str) -> Iterator[None]:
    """Turn errors of computing without values into one line."""
    try:
        yield
    except VillaError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{what} cannot be planned, for what it computes depends on numbers that are not there: "
            f"{one_line(error):.120}"
        ) from error


def _strategy(config: RunConfig) -> tuple[StrategyName, int]:
    """Return the recipe's strategy, and the number of processes set by torchrun or a launcher."""
    return config.distributed.strategy, Place.read(os.environ).world_size


def _planned(
    config: RunConfig, model: Model, found: Sequence[Sample], device: str, strategy: StrategyName, processes: int
) -> Plan:
    with _plannable(f"model '{config.model.name}' with trainer '{config.trainer.name}'"):
        return make_plan(config, model, found, device=device, strategy=strategy, processes=processes)


@dataclass(frozen=True)
class _Source:
    """Training data to plan with.

    Attributes:
        data: the data set.
        facts: its sizes.
        samples: a micro-batch of every objective.
        split: the training split.
        sampler: its sampler.
    """

    data: TaskDataset
    facts: DataFacts
    samples: list[Sample]
    split: Split
    sampler: Sampler


def _from_data(config: RunConfig) -> _Source:
    """Return sizes and micro-batches of the data, reading one example of every objective."""
    data: TaskDataset = DATASETS.get(config.dataset.name)(config.dataset)
    split = data.split("train")
    sampler = split.sampler(config.batch, config.seed)
    return _Source(data, data.facts(), samples(data, split, sampler, _objectives(config)), split, sampler)


def _made_up(config: RunConfig, values: Sequence[str], stage: int, sizes: Sizes) -> tuple[DataFacts, list[Sample]]:
    """Return the sizes of the released data, and micro-batches of ``dataset.synthetic`` stretched to ``sizes``.

    Args:
        config: the recipe.
        values: the arguments of the recipe.
        stage: index of the stage, from 0.
        sizes: sizes of an example.

    Raises:
        ConfigError: the data set generates no examples.
    """
    if not hasattr(config.dataset, "synthetic"):
        raise ConfigError(
            f"dataset '{config.dataset.name}' cannot make up examples (it has no option 'synthetic'); plan with its "
            "data: villa_run --dry-run"
        )
    source = _from_data(load_stages([*values, "dataset.synthetic=true"])[stage].config)
    known, found = source.facts, source.samples
    labels = CLASSES if any(sample.label or sample.batch.objective for sample in found) else known.num_labels
    facts = DataFacts(VOCABULARY, labels, WIDTH, known.task, pixels=known.pixels)
    batch = config.batch
    cut = UpdateSampler([1], batch, 0)
    made = []
    for small_one in found:
        sample = replace(small_one, micro_batches=cut.passes)
        made.append(stretched(sample, sizes.tokens, sizes.regions, facts, cut.per_pass, by_tokens=bool(batch.tokens)))
    return facts, made


def _objectives(config: RunConfig) -> Mapping[str, float]:
    found: Mapping[str, float] = config.dataset.objectives()
    return found


#: Sizes used if the data is missing; the points do not depend on them.
_ANY_DATA = DataFacts(vocab_size=30522, num_labels=2, feature_dim=2048, pixels=CENTRED)


def describe_points(config: RunConfig) -> list[str]:
    """Describe in lines where a recipe's model is perturbed, without loading or allocating weights.

    Args:
        config: the recipe; its data may be missing.

    Raises:
        ConfigError: the model cannot be built.
    """
    with torch.device("meta"), within_memory(config.model.name):
        model: Model = MODELS.get(config.model.name).from_config(config.model, facts_of(config))
    points = model.perturbation_points()
    inner = getattr(model, "transformer", None)
    kind = "" if inner is None else f" ({type(inner).__name__})"
    lines = [f"model '{config.model.name}'{kind} can be perturbed in {' and '.join(points) or 'nothing'}:"]
    width = max(map(len, points), default=0)
    lines += [f"  {modality:{width}}  {_describe(model, point)}" for modality, point in points.items()]
    others = model.other_points()
    for modality in dict.fromkeys(key.partition(".")[0] for key in others):
        names = summary(key for key in others if key.startswith(f"{modality}."))
        lines.append(f"other points: trainer.points.{modality} may be embeddings (the above), {', '.join(names)}")
    if hasattr(config.model, "points"):
        lines.append("another place: model.points.<modality>=path.to.module, or path.to.module:input, or ...:argument")
    return lines


def _describe(model: Model, point: Point) -> str:
    return ", ".join(_parts(model, point))


def _parts(model: Model, point: Point) -> Iterator[str]:
    kind = type(model.get_submodule(point.module)).__name__
    side = f"argument '{point.argument}'" if point.argument is not None else point.side
    yield f"{point.module}: {side} of {kind}"
    if point.layout == "channels_first":
        yield "a map of patches"
    if point.confined:
        yield "at the positions of this modality only"


def facts_of(config: RunConfig) -> DataFacts:
    """Return the facts of the data, or made-up ones if it cannot be read."""
    try:
        facts: DataFacts = DATASETS.get(config.dataset.name)(config.dataset).facts()
    except DataError as error:
        reason = str(error).splitlines()[0].rstrip(":")
        print(f"villa_run: the sizes of the data are made up, because it cannot be read: {reason}", file=sys.stderr)
        target = {"text": "generation", "pair": "contrastive"}.get(getattr(config.dataset, "target", ""))
        return _ANY_DATA if target is None else replace(_ANY_DATA, num_labels=None, task=target)  # type: ignore[arg-type]
    return facts
