"""Robust accuracy: every example under every attack, at every radius."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from villa.analysis.attacks import Attack, Ball
from villa.analysis.differences import resamples
from villa.analysis.victim import Victim
from villa.batch import Batch
from villa.config.schema import RobustnessConfig
from villa.errors import ConfigError, nearest
from villa.models.base import Model
from villa.registry import ATTACKS
from villa.rng import derive_seed

#: Modalities that an option names, together.
VIEWS: dict[str, tuple[str, ...]] = {"text": ("text",), "image": ("image",), "both": ("text", "image")}
#: What attacks on the words of the input change, beside these.
WORDS = "words"


class Case(NamedTuple):
    """One curve: an attack on a modality.

    Attributes:
        modality: ``text``, ``image`` or ``both``; or ``words`` of the input.
        attack: name of the attack.
        loss: what it raises.
        radii: sizes, ascending; of changes of words, how many may change.
        steps: its gradient steps.
        restarts: its random starts.
        transferred: whether it follows the gradients of another model.
    """

    modality: str
    attack: str
    loss: str
    radii: tuple[float, ...]
    steps: int
    restarts: int
    transferred: bool = False

    @property
    def changes_words(self) -> bool:
        """Whether words of the input are changed, and not embeddings."""
        return self.modality == WORDS

    def build(self) -> Attack:
        """Build an attack on embeddings."""
        attack: Attack = ATTACKS.get(self.attack)(self.steps, self.restarts)
        return attack

    def passes(self) -> tuple[int, int]:
        """Return the most forward and backward passes of an example at all radii."""
        forwards, backwards = self.build().passes()
        return forwards * len(self.radii), backwards * len(self.radii)


@dataclass(frozen=True)
class Outcome:
    """What an attack did to an example, with an entry for each radius.

    Attributes:
        id: the example.
        scores: the worst score.
        losses: the loss there.
        sizes: size of the perturbation there relative to the embedding (l2), the larger one of two modalities; or the
            share of the words that changed.
        forwards: forward passes, or texts that were run.
        backwards: backward passes.
        flat: whether the first gradient was zero or not finite.
        words: of changes of words, how many changed.
        texts: the text as it is, and there.
        similarities: mean cosine similarity of the words that changed to those before; None if it is not known.
        slope_error: relative error of the gradient, if it was measured.
    """

    id: str
    scores: list[float]
    losses: list[float]
    sizes: list[float]
    forwards: list[int]
    backwards: list[int]
    flat: bool
    words: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    similarities: list[float | None] = field(default_factory=list)
    slope_error: float | None = None


def cases(config: RobustnessConfig, model: Model, option: str = "robustness") -> list[Case]:
    """Return the cases that a recipe asks for.

    Raises:
        ConfigError: the model cannot be perturbed so.
    """
    spaces = {name: ATTACKS.get(name).space for name in config.attacks}
    found = [
        Case(WORDS, name, loss, tuple(config.text.budgets), 0, 0, config.source is not None)
        for name in config.attacks
        if spaces[name] == "words"
        for loss in config.losses
    ]
    others = [name for name in config.attacks if spaces[name] == "embedding"]
    return [*_embedding_cases(config, others, model, option), *found] if others else found


def _embedding_cases(config: RobustnessConfig, attacks: Sequence[str], model: Model, option: str) -> list[Case]:
    points = model.perturbation_points()
    possible = [name for name, view in VIEWS.items() if set(view) <= set(points)]
    for name in config.modalities:
        if name not in possible:
            raise ConfigError(
                f"{option}.modalities names {name}, but this model can be perturbed in "
                f"{' and '.join(points) or 'nothing'}; set it to {', '.join(possible) or 'another model'}"
            )
    if not possible:
        raise ConfigError("this model has no perturbation points, so that it cannot be attacked in its embeddings")
    for modality, name in config.points.items():
        key, known = f"{modality}.{name}", model.other_points()
        if key not in known:
            raise ConfigError(
                f"{option}.points names {key}, which this model does not have{nearest(key, known)}; see villa_run "
                "--perturbation-points"
            )
    if config.relative_to == "table" and any("image" in VIEWS[name] for name in config.modalities or possible):
        raise ConfigError(f"{option}.relative_to=table is for modalities=[text]: images are not looked up in a table")
    return [
        Case(modality, attack, loss, tuple(config.radii), config.steps, config.restarts, config.source is not None)
        for modality in config.modalities or possible
        for attack in attacks
        for loss in (config.losses if attack != "noise" else config.losses[:1])
    ]


def point_keys(modality: str, points: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys of the perturbation points of a view."""
    return tuple(f"{name}.{points[name]}" if name in points else name for name in VIEWS[modality])


def chosen(count: int, examples: int | None, seed: int) -> list[int]:
    """Return the indices of the examples to attack, ascending: the same for every model of the data."""
    if examples is None or examples >= count:
        return list(range(count))
    order = sorted(range(count), key=lambda index: derive_seed("attacked", seed, index))
    return sorted(order[:examples])


def attack(
    case: Case,
    config: RobustnessConfig,
    batch: Batch,
    make: Callable[[], Victim],
) -> list[Outcome]:
    """Attack a batch at every radius.

    Args:
        case: the attack.
        config: norms and units.
        batch: the examples.
        make: makes a victim of the batch.
    """
    method, found, before = case.build(), [], None
    for radius in case.radii:
        keys = point_keys(case.modality, config.points)
        ball = Ball(keys, radius, config.norm, config.scope, config.relative_to)
        victim = make()
        if before is not None and method.nested:
            victim.inherit(before)
        if not victim.done():
            method.search(victim, ball)
            victim.round_images()
        found.append(victim)
        before = victim
    return [_outcome(number, id_, found) for number, id_ in enumerate(batch.ids)]


def _outcome(number: int, id_: str, victims: Sequence[Victim]) -> Outcome:
    flat, errors = (
        next((found for victim in victims if (found := getattr(victim, name)) is not None), None)
        for name in ("flat", "slope_errors")
    )
    return Outcome(
        id_,
        [victim.scores[number].item() for victim in victims],
        [victim.losses[number].item() for victim in victims],
        [max((size[number].item() for size in victim.sizes.values()), default=0.0) for victim in victims],
        [victim.forwards for victim in victims],
        [victim.backwards for victim in victims],
        bool(flat is not None and flat[number]),
        slope_error=None if errors is None else float(errors[number]),
    )


def interval(
    scores: Sequence[float], seed: int = 0, draws: int = 1000, weights: Sequence[int] | None = None
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over examples, or of the weighted mean over clusters of them."""
    values = np.asarray(scores, np.float64)
    sizes = None if weights is None or len({*weights}) == 1 else np.asarray(weights, np.float64)
    means = []
    for picks in resamples(len(values), draws, seed=seed):
        drawn = values[picks]
        if sizes is None:
            means.append(drawn.mean(1))
        else:
            means.append((drawn * sizes[picks]).sum(1) / sizes[picks].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def area(radii: Sequence[float], means: Sequence[float], clean: float) -> float:
    """Return the area under the curve of mean scores from radius 0 to the largest one, over that radius."""
    xs, ys = (0.0, *radii), (clean, *means)
    return sum((x1 - x0) * (y0 + y1) / 2 for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False)) / xs[-1]
