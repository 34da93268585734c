"""Attacks on the model of a run: which examples, by which processes."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from villa.analysis.report import Clean
from villa.analysis.robustness import Case, Outcome, attack, cases, chosen
from villa.analysis.shifts import Shift, has_text
from villa.analysis.text_shifts import read_rephrasings, rephrased
from villa.analysis.victim import HeldOut, Measure, Victim
from villa.analysis.word_attacks import WordAttack
from villa.analysis.word_search import Run, Start, attack_words, runner, words_of
from villa.analysis.words import Texts
from villa.batch import Batch
from villa.config.loader import load
from villa.config.schema import RobustnessConfig
from villa.datasets.base import Example
from villa.engine.inference import restore_parts
from villa.engine.passes import ModelPasses, Precision
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError, about
from villa.evaluation.metrics import Metric
from villa.registry import ATTACKS, METRICS, SHIFT_GROUPS, SHIFTS
from villa.rng import derive_seed, generator

T = TypeVar("T")

#: Most examples that are attacked at once.
_AT_ONCE = 32
#: What most shifts of a modality change.
_CHANGED = {"text": "texts", "image": "regions"}


class Attacked(NamedTuple):
    """An example that is right without an attack: its place in the split, its id, and its loss and score."""

    place: int
    id: str
    loss: float
    score: float


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
        self.metric, metric = example_metric(parts)
        self._measures = {name: Measure(parts.loss, metric, name) for name in ("task", "margin")}
        self.cases = cases(config, parts.model, option)
        self.split = parts.split(config.split, f"{option}.split")
        self._indices = chosen(len(self.split), config.examples, config.seed)
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
        self._option, self._shifts = option, dict[str, Shift]()
        self._words = self._word_attacks()

    def robust_score(self) -> float:
        """Return the mean over examples of the worst score of all cases, at their largest radius."""
        clean, attacked, _ = self.run_clean()
        self._words = self._word_attacks()  # with the embeddings that the model has now
        lowest = dict(clean.scores)
        for case in self.cases:
            for part in self.work(case, attacked):
                for one in self.run(case, part):
                    lowest[one.id] = min(lowest[one.id], one.scores[-1])
        return fmean(lowest.values())

    def shift(self, name: str) -> Shift:
        """Return a shift that is ready for the examples.

        Raises:
            VillaError: the data or the model lack what is shifted.
        """
        if name in self._shifts:
            return self._shifts[name]
        shift: Shift = SHIFTS.get(name)()
        first = self.split[self._indices[0]]
        self._check_shift(name, shift, first)
        with about(f"robustness.shifts names {name}"):
            shift.prepare(self.texts)
            shift.apply(first, 1, generator("trial"), lambda: first)
        self._shifts[name] = shift
        return shift

    def shifted(self, name: str, severity: int) -> dict[str, float]:
        """Return the scores of examples whose inputs are shifted, by id; a collective call.

        Raises:
            VillaError: see ``shift``.
        """
        shift = self.shift(name)
        scored = self._scored(lambda place: self._shift(shift, name, severity, place), self._indices)
        return {id_: score for _, id_, _, score in scored}

    def _check_shift(self, name: str, shift: Shift, first: Example) -> None:
        """Refuse a shift of what the examples do not have, or whose package is not installed."""
        if not shift.fits(first):
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

    def rephrasings(self, path: Path) -> dict[str, list[str]]:
        """Read other wordings of the examples, by id.

        Raises:
            DataError: an example has none, or an id is none of the split's.
        """
        found = read_rephrasings(path)
        ids = [self.split[place].id for place in self._indices]
        without = [id_ for id_ in ids if id_ not in found]
        if without:
            raise DataError(
                f"'{path}' has no rephrasing of {len(without)} of the {len(ids)} examples (first: '{without[0]}'); add "
                "them, or choose a split whose examples have some (robustness.split)"
            )
        unknown = found.keys() - set(ids)
        if unknown:
            unknown -= {self.split[place].id for place in range(len(self.split))}
        if unknown:
            raise DataError(
                f"'{path}' rephrases '{min(unknown)}', which is no example of the split {self.config.split} (and "
                f"{len(unknown) - 1} more); mend the ids"
            )
        with about(f"'{path}'"):
            rephrased(self.texts, self.split[self._indices[0]], found[ids[0]][0])
        return {id_: found[id_] for id_ in ids}

    def rephrased(self, rephrasings: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
        """Return the scores of examples with other wordings, by id; a collective call."""
        variants = [
            (place, text) for place, texts in zip(self._indices, rephrasings.values(), strict=True) for text in texts
        ]

        def read(number: int) -> Example:
            place, text = variants[number]
            return rephrased(self.texts, self.split[place], text)

        scores: dict[str, list[float]] = {}
        for _, id_, _, score in self._scored(read, range(len(variants))):
            scores.setdefault(id_, []).append(score)
        return scores

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
        for place, id_, loss, score in self._scored(self.split.__getitem__, self._indices):
            scores[id_], losses[id_] = score, loss
            attacked += [Attacked(place, id_, loss, score)] if score > 0 else []
        seconds = (time.perf_counter() - began) / max(1, len(self._indices))
        return Clean(scores, losses), attacked, seconds

    def _scored(self, read: Callable[[int], Example], places: Sequence[int]) -> Iterator[tuple[int, str, float, float]]:
        """Yield place, id, loss and score of the examples that ``read`` returns for places, in order.

        A collective call.
        """
        for part in _chunks(places, self.parts.config.evaluation.examples * self.processes.world_size):
            mine, own = self._share(part)
            batch = self._batch(map(read, mine))
            losses, scores = self._victim(batch, "task", self._passes).clean()
            rows = [*zip(mine, batch.ids, losses.tolist(), scores.tolist(), strict=True)] if own else []
            gathered = self.processes.gather(list(map(list, rows)))
            yield from (tuple(row) for row in sorted(row for rows in gathered for row in rows))

    def run(self, case: Case, chunk: Sequence[Attacked]) -> list[Outcome]:
        """Attack some examples, each process a share of them; a collective call."""
        mine, own = self._share(chunk)
        examples, guide = [self.split[one.place] for one in mine], self._guide if case.transferred else None
        if case.changes_words:
            known = case.loss == "task" and guide is None
            starts = [
                Start(example, one.loss if known else None, one.score)
                for example, one in zip(examples, mine, strict=True)
            ]
            run = self._runner(case)
            outcomes = attack_words(self._words[case.attack], case.radii, starts, run, self._any)
        else:
            batch = self._batch(examples)
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

    def _runner(self, case: Case) -> Run:
        """Return what runs texts of one example."""

        def victims(passes: ModelPasses) -> Callable[[Sequence[Example]], Victim]:
            return lambda texts: self._victim(self._batch(texts), case.loss, passes)

        return runner(victims(self._passes), victims(self._guide) if case.transferred and self._guide else None)

    def _any(self, mine: bool) -> bool:
        return bool(self.processes.largest(int(mine)))

    def _share(self, items: Sequence[T]) -> tuple[Sequence[T], bool]:
        """Return this process's part of some examples; one that has none repeats the first."""
        mine = items[self.processes.rank :: self.processes.world_size]
        return (mine, True) if mine else (items[:1], False)

    def _word_attacks(self) -> dict[str, WordAttack]:
        """Build the attacks on words.

        Raises:
            VillaError: the data or the model lack what one needs.
        """
        limit = int(getattr(self.parts.data.config, "max_text_length", 0) or 0)
        self.texts = Texts(self.config.text, self.parts.data.facts(), limit, self._table, self.config.seed)
        names = dict.fromkeys(case.attack for case in self.cases if case.changes_words)
        return {name: self._word_attack(name, self._option) for name in names}

    def _word_attack(self, name: str, option: str) -> WordAttack:
        first = self.split[self._indices[0]]
        if not has_text(first):
            raise ConfigError(
                f"{option}.attacks names {name}, which changes words, but the examples have none (first: "
                f"'{first.id}'); leave it out"
            )
        with about(f"{option}.attacks names {name}"):
            made: WordAttack = ATTACKS.get(name)(self.texts)
            if self.config.source is not None and not made.transferable:
                raise ConfigError("it needs the model's own gradients; leave robustness.source out, or the attack")
            self.texts.wording(first)
        return made

    def most_passes(self, case: Case, attacked: Sequence[Attacked]) -> tuple[int, int]:
        """Return the most forward and backward passes of an example."""
        if not case.changes_words:
            return case.passes()
        words = max((len(self.texts.wording(self.split[one.place]).words) for one in attacked), default=0)
        return self._words[case.attack].queries(words, words_of(case.radii[-1], words))

    def _table(self) -> Tensor | None:
        """Return the embedding table in which the model looks words up; None if it has none. A collective call."""
        point = self.parts.model.perturbation_points().get("text")
        module = None if point is None else self.parts.model.get_submodule(point.module)
        if not isinstance(module, nn.Embedding):
            return None
        taken: list[Tensor] = []
        # Sharded weights are whole within a pass.
        handle = module.register_forward_hook(lambda table, *_: taken.append(table.weight.detach().float().cpu()))
        try:
            self._victim(self._batch([self.split[self._indices[0]]]), "task", self._passes).clean()
        finally:
            handle.remove()
        return taken[0].clone() if taken else None


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


def example_metric(parts: Parts) -> tuple[str, Metric]:
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
