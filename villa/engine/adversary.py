"""An adversary of one example: perturbations of text, image or both that change a model's own answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from villa.analysis.movement import Movement, move, own_answers
from villa.analysis.victim import Measure, Victim
from villa.batch import Batch
from villa.datasets.own.question_answering import QuestionAnswering
from villa.engine.attacking import example_metric
from villa.engine.passes import ModelPasses
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError
from villa.models.base import ModelOutput
from villa.rng import derive_seed

#: Most answers that are shown with their scores.
_SHOWN = 5


@dataclass(frozen=True)
class Attacked:
    """What an adversary does to one example.

    Attributes:
        before: the best answers and their scores in [0, 1], best first.
        after: those under attack.
        movement: what the adversary changes.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    movement: Movement


def attack_example(
    parts: Parts,
    batch: Batch,
    names: Callable[[int], str],
    *,
    radius: float,
    steps: int,
    modality: str = "both",
) -> Attacked:
    """Attack the model's own answer to one example by PGD in the embeddings.

    Args:
        parts: the model and its data.
        batch: the example, on the device.
        names: returns the word of a token id.
        radius: size of the perturbation, relative to the embedding.
        steps: steps of the attack.
        modality: ``text``, ``image`` or ``both``: all that the model has.

    Raises:
        ConfigError: the model cannot be perturbed there, or the task cannot be attacked.
        DataError: the model does not choose among labels.
    """
    if parts.data.facts().task == "generation":
        raise DataError("the model writes its answers, and does not choose among labels: no adversary is looked for")
    points = points_of(parts, modality)
    passes = ModelPasses(parts.model, parts.loss, parts.precision, parts.config.seed, parts.strategy)
    passes.begin(0, 0, 1.0)
    _, metric = example_metric(parts)
    if batch.targets is not None:
        soft = batch.targets.is_floating_point()
    else:
        soft = isinstance(parts.data, QuestionAnswering) and parts.data.vocabulary.soft
    clean = passes.forward(batch, grad=False, train=False)
    batch = own_answers(clean, batch, soft=soft)

    def decode(output: ModelOutput) -> list[dict[str, Any]]:
        return parts.decode(batch, output)

    victim = Victim(passes, batch, Measure(parts.loss, metric), [derive_seed("attention", id_) for id_ in batch.ids])
    (movement,) = move(victim, parts.model, points, decode, names, radius=radius, steps=steps)
    return Attacked(best_scores(parts, batch, clean), best_scores(parts, batch, victim.worst()), movement)


def points_of(parts: Parts, modality: str) -> dict[str, Any]:
    """Return the perturbation points of a modality, or of all (``both``).

    Raises:
        ConfigError: the model has none.
    """
    points = dict(parts.model.perturbation_points())
    chosen = points if modality == "both" else {name: point for name, point in points.items() if name == modality}
    if not chosen:
        known = ", ".join(points) or "nothing"
        raise ConfigError(f"modality '{modality}': the model can be perturbed in {known}; give one of these, or both")
    return chosen


def best_scores(parts: Parts, batch: Batch, output: ModelOutput) -> dict[str, float]:
    """Return the best answers to the first example with their scores, best first; one if there are no labels."""
    ranked = parts.data.rank(output.logits)
    if ranked is None:
        (decoded,) = parts.decode(batch, output)
        return {str(decoded["answer"]): float(decoded["score"])}
    scores, labels = ranked
    best = scores[0].topk(min(_SHOWN, len(labels)))
    return {labels[label]: score for label, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
