"""Attacks on the model of a run: which examples, by which processes."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch

from villa.analysis.report import Clean, worst
from villa.analysis.robustness import Case, Outcome, attack, cases, chosen
from villa.analysis.shifts import Shift
from villa.analysis.victim import HeldOut, Measure, Victim
from villa.batch import Batch
from villa.config.loader import load
from villa.config.schema import RobustnessConfig
from villa.datasets.base import Example
from villa.engine.inference import restore_parts
from villa.engine.passes import ModelPasses, Precision
from villa.engine.setup import Parts
from villa.errors import ConfigError
from villa.evaluation.metrics import Metric
from villa.registry import ATTACKS, METRICS, SHIFT_GROUPS, SHIFTS, expand_shifts
from villa.rng import derive_seed, generator

#: Most examples that are attacked at once.
_AT_ONCE = 32
#: What most shifts of a modality change.
_CHANGED = {"text": "texts", "image": "regions"}


class Attacked(NamedTuple):
    """An example that is right without an attack: its place in the split, and its id."""

    place: int
    id: str


class Attacks:
    """Attacks on a model.

    Args:
        parts: the model and its data.
        config: attacks, examples and options.
        option: the section of the recipe that they are from, for messages.

    Attributes:
        metric: name of the score.
        cases: what the configuration asks for.
        processes: the processes that share the examples.

    Raises:
        ConfigError: the task or the model cannot be attacked so.
    """

    def __init__(self, parts: Parts, config: RobustnessConfig, option: str = "robustness") -> None:
        self.parts, self.config, self.processes = parts, config, parts.strategy.processes
        self.metric, metric = _metric(parts)
        self._measures = {name: Measure(parts.loss, metric, name) for name in ("task", "margin")}
        self.cases = cases(config, parts.model, option)
        self.split = parts.split(config.split, f"{option}.split")
        self._indices = chosen(len(self.split), config.examples, config.seed)
        self._shifts = self._fitting(expand_shifts(config.shifts))
        self._passes = ModelPasses(parts.model, parts.loss, parts.precision, config.seed, parts.strategy)
        self._held_out = HeldOut(self._others)
        learning = [name for name in config.attacks if ATTACKS.get(name).learns]
        if learning and parts.config.evaluation.split in (None, config.split):
            raise ConfigError(
                f"{option}.attacks names {learning[0]}, which learns from evaluation.split to attack {option}.split, "
                f"but these are {parts.config.evaluation.split} and {config.split}; give two different splits"
            )
        exact = Precision("fp32", parts.precision.device)
        self._exact = ModelPasses(parts.model, parts.loss, exact, config.seed, parts.strategy)
        self._guide = None if config.source is None else _guide(parts, config.source)

    def robust_score(self) -> float:
        """Return the mean over examples of the worst score of all cases, at their largest radius."""
        clean, attacked, _ = self.run_clean()
        outcomes = {
            case: [one for part in self.work(case, attacked) for one in self.run(case, part)] for case in self.cases
        }
        return fmean(scores[-1] for scores in worst(outcomes, clean, len(self.config.radii)))

    def shifted(self, name: str, severity: int) -> dict[str, float]:
        """Return the scores of examples whose inputs are shifted, by id; a collective call."""
        scored = self._scored(lambda place: self._shift(self._shifts[name], name, severity, place))
        return {id_: score for _, id_, _, score in scored}

    def _fitting(self, names: Sequence[str]) -> dict[str, Shift]:
        """Return shifts by name.

        Raises:
            ConfigError: the examples do not have what one changes, or it is not installed.
        """
        shifts: dict[str, Shift] = {name: SHIFTS.get(name)() for name in names}
        first = self.split[self._indices[0]] if shifts else None
        for name, shift in shifts.items():
            if first is not None and not shift.fits(first):
                others = [other for other in SHIFTS.names() if SHIFTS.get(other)().fits(first)]
                groups = [group for group, members in SHIFT_GROUPS.items() if set(members) <= set(others)]
                fit = [other for other in others if not any(other in SHIFT_GROUPS[group] for group in groups)]
                raise ConfigError(
                    f"robustness.shifts names {name}, which changes {shift.changes or _CHANGED[shift.modality]}, but "
                    f"the examples have none (first: '{first.id}'); give some of {', '.join([*groups, *fit])}"
                )
            if shift.requires is not None and importlib.util.find_spec(shift.requires[0]) is None:
                module, extra = shift.requires
                raise ConfigError(f"robustness.shifts names {name}, which needs {module}; pip install 'villa[{extra}]'")
        return shifts

    def _shift(self, shift: Shift, name: str, severity: int, place: int) -> Example:
        example, count = self.split[place], len(self.split)
        draws = generator("shift", self.config.seed, example.id, name, severity)

        def other() -> Example:
            step = 1 + int(torch.randint(max(count - 1, 1), (), generator=draws))
            return self.split[(place + step) % count]

        return shift.apply(example, severity, draws, other)

    def work(self, case: Case, attacked: Sequence[Attacked]) -> Iterator[Sequence[Attacked]]:
        """Yield examples in parts that all processes attack together."""
        return _chunks(attacked, min(_AT_ONCE, self.parts.config.evaluation.examples) * self.processes.world_size)

    def run_clean(self) -> tuple[Clean, list[Attacked], float]:
        """Return results without an attack, the examples that are right, and seconds an example."""
        scores: dict[str, float] = {}
        losses: dict[str, float] = {}
        attacked: list[Attacked] = []
        began = time.perf_counter()
        for place, id_, loss, score in self._scored(self.split.__getitem__):
            scores[id_], losses[id_] = score, loss
            attacked += [Attacked(place, id_)] if score > 0 else []
        seconds = (time.perf_counter() - began) / max(1, len(self._indices))
        return Clean(scores, losses), attacked, seconds

    def _scored(self, read: Callable[[int], Example]) -> Iterator[tuple[int, str, float, float]]:
        """Yield place, id, loss and score of all examples, as ``read`` returns them, in order; a collective call."""
        for part in _chunks(self._indices, self.parts.config.evaluation.examples * self.processes.world_size):
            mine, own = self._share(part)
            batch = self._batch(map(read, mine))
            losses, scores = self._victim(batch, "task", self._passes).clean()
            rows = [*zip(mine, batch.ids, losses.tolist(), scores.tolist(), strict=True)] if own else []
            gathered = self.processes.gather(list(map(list, rows)))
            yield from (tuple(row) for row in sorted(row for rows in gathered for row in rows))

    def run(self, case: Case, chunk: Sequence[Attacked]) -> list[Outcome]:
        """Attack some examples, each process a share of them; a collective call."""
        mine, own = self._share([one.place for one in chunk])
        batch, guide = self._batch(map(self.split.__getitem__, mine)), self._guide if case.transferred else None
        passes = self._exact if case.build().exact else self._passes
        outcomes = attack(case, self.config, batch, lambda: self._victim(batch, case.loss, passes, guide))
        parts = self.processes.gather([asdict(one) for one in outcomes] if own else [])
        return [Outcome(**one) for part in parts for one in part]

    def _others(self) -> Iterator[Batch]:
        """Yield batches of as many validation examples as are attacked; the same ones on every process."""
        split = self.parts.split(str(self.parts.config.evaluation.split), "evaluation.split")
        places = chosen(len(split), self.config.examples, self.config.seed)
        for part in _chunks(places, min(_AT_ONCE, self.parts.config.evaluation.examples)):
            yield self._batch(map(split.__getitem__, part))

    def _batch(self, examples: Iterable[Example]) -> Batch:
        return self.parts.data.collate(list(examples)).to(self.parts.precision.device)

    def _victim(self, batch: Batch, loss: str, passes: ModelPasses, guide: ModelPasses | None = None) -> Victim:
        passes.begin(0, 0, 1.0)
        seeds = [derive_seed("attack", self.config.seed, id_) for id_ in batch.ids]
        return Victim(passes, batch, self._measures[loss], seeds, self._any, guide, self._held_out)

    def _any(self, mine: bool) -> bool:
        return bool(self.processes.largest(int(mine)))

    def _share(self, indices: Sequence[int]) -> tuple[Sequence[int], bool]:
        """Return this process's part of some examples; one that has none repeats the first."""
        mine = indices[self.processes.rank :: self.processes.world_size]
        return (mine, True) if mine else (indices[:1], False)


def robust_values(parts: Parts) -> Callable[[], dict[str, float]]:
    """Return a function that attacks the model on the validation split, and returns ``robust_<metric>``.

    Raises:
        ConfigError: the task or the model cannot be attacked so.
    """
    options = parts.config.evaluation.robustness
    config = RobustnessConfig(
        attacks=options.attacks,
        modalities=[options.modality],
        radii=[options.radius],
        steps=options.steps,
        split=str(parts.config.evaluation.split),
        examples=options.examples,
    )
    attacks = Attacks(parts, config, "evaluation.robustness")
    return lambda: {f"robust_{attacks.metric}": attacks.robust_score()}


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _metric(parts: Parts) -> tuple[str, Metric]:
    """Return the recipe's first metric that scores each example by itself.

    Raises:
        ConfigError: there is none, or the loss compares examples.
    """
    config = parts.config
    if config.dataset.objectives() or parts.loss.compares_examples(()):
        raise ConfigError(
            "run_type=robustness attacks each example by itself, but the examples of this task have no score of their "
            "own; attack a model that was finetuned on questions, pairs or texts with labels"
        )
    for name in config.evaluation.metrics:
        kind: type[Metric] = METRICS.get(name)
        if kind.of_examples:
            return name, kind()
    raise ConfigError(
        f"run_type=robustness needs a metric that scores each example, which {', '.join(config.evaluation.metrics)} "
        "does not; set evaluation.metrics, for instance to [accuracy]"
    )


def _guide(parts: Parts, path: str) -> ModelPasses:
    """Return the passes of the model whose gradients are followed.

    Raises:
        ConfigError: it has other perturbation points.
    """
    stored = load([f"checkpoint.path={json.dumps(path)}", "run_type=robustness"]).config
    other, _ = restore_parts(replace(stored, distributed=parts.config.distributed, device=parts.config.device))
    other.distribute()
    if set(other.model.perturbation_points()) != set(parts.model.perturbation_points()):
        raise ConfigError(
            f"robustness.source='{path}' is perturbed in {' and '.join(other.model.perturbation_points())}, and the "
            f"model that is attacked in {' and '.join(parts.model.perturbation_points())}; give one of the same kind"
        )
    return ModelPasses(other.model, other.loss, other.precision, parts.config.robustness.seed, other.strategy)
