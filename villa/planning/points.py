"""``--perturbation-points``: describe where the model of a recipe is perturbed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from villa.config.schema import RunConfig
from villa.engine.setup import within_memory
from villa.errors import DataError
from villa.facts import DataFacts
from villa.models.base import Model, Point
from villa.registry import DATASETS, MODELS

#: Sizes used if the data is missing; the points do not depend on them.
_ANY_DATA = DataFacts(vocab_size=30522, num_labels=2, feature_dim=2048)


def describe_points(config: RunConfig) -> list[str]:
    """Describe in lines where a recipe's model is perturbed, without loading or allocating weights.

    Args:
        config: the recipe; its data may be missing.

    Raises:
        ConfigError: the model cannot be built.
    """
    with torch.device("meta"), within_memory(config.model.name):
        model: Model = MODELS.get(config.model.name).from_config(config.model, _facts(config))
    points = model.perturbation_points()
    inner = getattr(model, "transformer", None)
    kind = "" if inner is None else f" ({type(inner).__name__})"
    lines = [f"model '{config.model.name}'{kind} can be perturbed in {' and '.join(points) or 'nothing'}:"]
    width = max(map(len, points), default=0)
    lines += [f"  {modality:{width}}  {_describe(model, point)}" for modality, point in points.items()]
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


def _facts(config: RunConfig) -> DataFacts:
    """Return the facts of the data, or made-up ones if it cannot be read."""
    try:
        facts: DataFacts = DATASETS.get(config.dataset.name)(config.dataset).facts()
    except DataError as error:
        reason = str(error).splitlines()[0].rstrip(":")
        print(f"villa_run: the sizes of the data are made up, because it cannot be read: {reason}", file=sys.stderr)
        target = {"text": "generation", "pair": "contrastive"}.get(getattr(config.dataset, "target", ""))
        return _ANY_DATA if target is None else replace(_ANY_DATA, num_labels=None, task=target)  # type: ignore[arg-type]
    return facts
