"""Bases of the methods that perturb: their options, and the bookkeeping of perturbations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from villa.adversarial.ascent import AscentSettings, Norm, RelativeTo, Scope
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.errors import ConfigError, nearest
from villa.models.base import Model, ModelOutput, Point, summary
from villa.objectives import check_objectives
from villa.trainers.base import Cost, Logs, Passes, Trainer, TrainerConfig
from villa.trainers.standard import CLEAN_COST

#: Upper bound on K: more passes would never finish.
_MOST_STEPS = 100_000

Modality = Literal["text", "image", "both", "alternating"]

#: Modalities perturbed together in one pass, by the option ``modality``.
VIEWS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "image": (("image",),),
    "both": (("text", "image"),),
    "alternating": (("text",), ("image",)),
}


#: Names of a modality's usual point, where it enters the model, and of whole images.
_USUAL, _PIXELS = "embeddings", "pixels"
_CHANNELS = 3


class PerturbationConfig(TrainerConfig):
    """The options that every perturbing method has; not a dataclass, so that subclasses order them."""

    modality: Any
    points: dict[str, Any]
    dropout: Literal["fresh", "shared"]
    objectives: list[str] | None

    def ascent(self, key: str) -> AscentSettings:
        """Return the settings of a perturbation; see ``keys``."""
        raise NotImplementedError

    def keys(self, modality: str) -> tuple[str, ...]:
        """Return the keys of a modality's perturbations: its own name at its usual point, else ``modality.point``."""
        names = self.points.get(modality, _USUAL)
        return tuple(
            modality if name == _USUAL else f"{modality}.{name}"
            for name in ([names] if isinstance(names, str) else names)
        )

    def check_points(self) -> None:
        """Raise ConfigError for points that are not of the perturbed modalities, or not given as names."""
        perturbed = [modality for view in VIEWS[self.modality] for modality in view]
        for modality, given in self.points.items():
            if modality not in perturbed:
                raise ConfigError(
                    f"trainer.points.{modality} has no effect with trainer.modality={self.modality}, which perturbs "
                    f"{' and '.join(perturbed)}; leave it out"
                )
            names = [given] if isinstance(given, str) else given
            if not (isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)):
                raise ConfigError(
                    f"trainer.points.{modality} is {given!r:.80}; give the name of a point, or a list of them, such as "
                    f"[{_USUAL}, layer.3]"
                )
            if len({*names}) < len(names):
                raise ConfigError(f"trainer.points.{modality} names a point twice: {', '.join(names)}")


@dataclass
class AdversarialConfig(PerturbationConfig):
    """Options of the methods that perturb by gradients.

    Attributes:
        steps: K. In methods that train on every pass, the perturbed passes of an update, between which the
            perturbation moves K - 1 times; in others, how often it moves.
        modality: what is perturbed: ``text``, ``image``, ``both`` in the same pass, or ``alternating`` (a pass
            for each, as in the paper).
        points: where a modality is perturbed, ``embeddings`` by default: a name or a list of names, each of which gets
            its own perturbation of the given sizes. ``layer.3`` is the input of a layer, counted from 0, and ``pixels``
            the image itself, whose sizes are those of colours in [0, 1] (``4/255``).
        text_step_size: length of an ascent step on the word embeddings.
        image_step_size: length of an ascent step on the region features.
        text_radius: bound on the norm of the text perturbation; None or 0 for none.
        image_radius: the same for the image.
        norm: ``l2`` or ``linf``, over all tokens of an example.
        init: distribution of the first perturbation: ``zero``, ``uniform``, ``normal``, or a registered initialiser.
        init_scale: its scale; None takes the radius, or the step size where there is no radius.
        mask_padding: padding neither moves nor counts in a norm.
        dropout: ``fresh`` masks in every pass, or ``shared`` by all passes of a micro-batch.
        fp32_gradient: round the perturbation's gradient to fp32 even in fp64 runs (released code).
        objectives: in pre-training, the objectives that are trained adversarially; batches of others take one clean
            pass. None perturbs every batch.
        scope: norms are those of a whole example (``row``), or of every ``token``.
        step: direction of an ascent: the ``normalised`` gradient, its ``sign``, the ``raw`` gradient, ``power`` (from
            zero along the normalised gradient at the perturbation: VAT), or a registered step.
        projection: onto the ``ball`` of the radius, onto the ``sphere`` (always as long as the radius), or a registered
            projection.
        relative_to: unit of step sizes, radii and ``init_scale``: ``none`` is 1; ``embedding``, the norm of what is
            perturbed; ``table``, the mean norm of the rows of the embedding table (with ``scope=token``).
        momentum: share of the last ascent's direction in the next one's; directions have length 1.
        channels: factors on the sizes of a perturbation of pixels for red, green and blue, with ``norm=linf``.
    """

    LEAST_STEPS: ClassVar[int] = 1

    steps: int = 3
    modality: Modality = "both"
    points: dict[str, Any] = field(default_factory=dict)
    text_step_size: float = 1e-3
    image_step_size: float = 1e-3
    text_radius: float | None = None
    image_radius: float | None = None
    norm: Norm = "l2"
    init: str = "uniform"
    init_scale: float | None = None
    mask_padding: bool = True
    dropout: Literal["fresh", "shared"] = "fresh"
    fp32_gradient: bool = False
    objectives: list[str] | None = None
    scope: Scope = "row"
    step: str = "normalised"
    projection: str = "ball"
    relative_to: RelativeTo = "none"
    momentum: float = 0.0
    channels: list[float] | None = None

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        check_objectives("trainer.objectives", self.objectives or ())
        self.check_points()
        if not self.LEAST_STEPS <= self.steps <= _MOST_STEPS:
            least = f"at least {self.LEAST_STEPS} and at most {_MOST_STEPS:,}"
            raise ConfigError(f"steps is {self.steps}; it must be {least}")
        check_finite(self, "text_step_size", "image_step_size", "text_radius", "image_radius", "init_scale", "momentum")
        self._check_channels()
        self.ascent("text").check()
        if self.relative_to == "table" and self.scope != "token":
            raise ConfigError("relative_to=table is the norm of a token; set scope to token")

    def _check_channels(self) -> None:
        """Raise ConfigError for factors on channels that are none, or that nothing has."""
        if self.channels is None:
            return
        if self.norm != "linf" or not any(key.endswith(f".{_PIXELS}") for key in self.keys("image")):
            raise ConfigError(
                f"channels is {self.channels}, factors for pixels in linf: set points.image to pixels and norm to linf"
            )
        if len(self.channels) != _CHANNELS or not all(0 <= factor < float("inf") for factor in self.channels):
            raise ConfigError(f"channels is {self.channels}; give three finite numbers of at least 0, for RGB")

    def ascent(self, key: str) -> AscentSettings:
        """Return the settings of a perturbation; see ``keys``."""
        modality, _, name = key.partition(".")
        step_size: float = getattr(self, f"{modality}_step_size")
        radius: float | None = getattr(self, f"{modality}_radius")
        scale = self.init_scale if self.init_scale is not None else (radius or step_size)
        return AscentSettings(
            step_size=step_size,
            radius=radius,
            norm=self.norm,
            init=self.init,
            init_scale=scale,
            mask_padding=self.mask_padding,
            fp32_gradient=self.fp32_gradient,
            scope=self.scope,
            step=self.step,
            projection=self.projection,
            relative_to=self.relative_to,
            momentum=self.momentum,
            channels=tuple(self.channels) if self.channels and name == _PIXELS else None,
        )


def check_finite(config: TrainerConfig, *names: str) -> None:
    """Check that options, if given, are finite and not negative.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"{name} is {value}; it must be a finite number of at least 0")


class AdversarialTrainer(Trainer):
    """Base of the methods that perturb."""

    Config: ClassVar[type[TrainerConfig]] = AdversarialConfig
    config: PerturbationConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        keys = self.config.keys
        self.views = tuple(
            tuple(k for modality in view for k in keys(modality)) for view in VIEWS[self.config.modality]
        )

    @cached_property
    def starts_at_zero(self) -> bool:
        """Whether all perturbations are zero at first."""
        return all(self.config.ascent(key).starts_at_zero for key in self.keys())

    def perturbs(self, batch: Batch) -> bool:
        """Return whether to perturb a batch; one without a pre-training objective always is."""
        return batch.objective is None or self.asks_for(batch.objective)

    def asks_for(self, objective: str) -> bool:
        """Return whether to train a pre-training objective adversarially."""
        return self.config.objectives is None or objective in self.config.objectives

    def cost_of(self, objective: str) -> Cost:
        """Return the cost of an objective: one clean pass unless it is trained adversarially."""
        return self.cost() if self.asks_for(objective) else CLEAN_COST

    def check(self, model: Model) -> None:
        """Refuse points that the model does not have, and sizes relative to a table where there is none."""
        points = {**model.perturbation_points(), **model.other_points()}
        for key in self.keys():
            if key not in points:
                raise ConfigError(_no_such_point(key, model, points))
            asked = self.config.ascent(key).relative_to == "table"
            if asked and not isinstance(model.get_submodule(points[key].module), nn.Embedding):
                raise ConfigError(
                    f"trainer.relative_to=table: what is perturbed in the {key} is not looked up in a table; set it to "
                    "embedding"
                )

    def modalities(self) -> tuple[str, ...]:
        """Return the perturbed modalities."""
        return tuple(dict.fromkeys(key.partition(".")[0] for key in self.keys()))

    def keys(self) -> tuple[str, ...]:
        """Return the keys of all perturbations; see ``PerturbationConfig.keys``."""
        return tuple(key for view in self.views for key in view)

    def perturbations(self, passes: Passes) -> dict[str, Perturbation]:
        """Create the perturbations of a micro-batch by key."""
        return {key: Perturbation(self.config.ascent(key), passes.seed(key)) for key in self.keys()}

    def pass_index(self, index: int) -> int:
        """Return the index that selects the dropout masks of pass ``index`` (0: the clean pass)."""
        return 0 if self.config.dropout == "shared" else index


def _no_such_point(key: str, model: Model, points: Mapping[str, Point]) -> str:
    """Say that a model has no such point, and which it has."""
    modality, _, name = key.partition(".")
    known = [_USUAL, *summary(other for other in points if other.startswith(f"{modality}."))]
    pixels = "; pixels need a model that reads them" if name == _PIXELS else ""
    return (
        f"trainer.points.{modality}: '{name}' is no point of {type(model).__name__}{nearest(name, known)}; it has "
        f"{', '.join(known)}{pixels}"
    )


class MultiStepTrainer(AdversarialTrainer):
    """Base of the methods that train on every pass on the way (FreeLB, VILLA)."""

    config: AdversarialConfig

    @cached_property
    def merged(self) -> bool:
        """Whether the first pass of every view is the clean pass: zero perturbations, the same dropout masks."""
        same = self.config.dropout == "shared" or not self.stochastic
        return same and self.starts_at_zero and not self.noisy

    def perturbations(self, passes: Passes) -> dict[str, Perturbation]:
        """Create the perturbations of a micro-batch, which never move if there is a single pass."""
        made = super().perturbations(passes)
        for perturbation in made.values():
            perturbation.frozen = self.config.steps == 1
        return made

    def move(self, perturbations: Mapping[str, Perturbation], gradient_scale: float, step: int) -> None:
        """Take the ascent step after pass ``step``; freeze the perturbations before the last pass.

        Args:
            perturbations: by modality, with gradients.
            gradient_scale: factor on these gradients.
            step: number of the pass, from 0.
        """
        if step + 1 == self.config.steps:
            return
        for perturbation in perturbations.values():
            perturbation.ascend(gradient_scale)
            perturbation.frozen = step + 2 == self.config.steps


@dataclass
class SearchConfig(AdversarialConfig):
    """Options of the methods that search a perturbation first, besides those of ``AdversarialConfig``.

    ``steps`` counts ascents.

    Attributes:
        weight: weight of what is trained on perturbed inputs.
        ascent_mode: ``eval`` runs the ascents without dropout.
    """

    LEAST_STEPS: ClassVar[int] = 0

    weight: float = 1.0
    ascent_mode: Literal["train", "eval"] = "train"

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        super().check()
        check_finite(self, "weight")


class SearchTrainer(AdversarialTrainer):
    """Base of the methods that search a perturbation, and train on it afterwards (PGD, SMART)."""

    config: SearchConfig

    def search(
        self,
        batch: Batch,
        passes: Passes,
        perturbations: Mapping[str, Perturbation],
        objective: Callable[[ModelOutput], Tensor],
        name: str,
        first: int = 0,
    ) -> Logs:
        """Ascend an objective of the output of every view, leaving the gradients of the parameters alone.

        Args:
            batch: the micro-batch.
            passes: its passes.
            perturbations: by modality.
            objective: maps an output to what is raised.
            name: name of the objective in the log.
            first: number of the first ascent.

        Returns:
            Values to log.
        """
        logs, views, train = Logs(), len(self.views), self.config.ascent_mode == "train"
        for t in range(first, self.config.steps):
            values = []
            for v, view in enumerate(self.views):
                perturbed, index = {m: perturbations[m] for m in view}, self.pass_index(t * views + v + 1)
                values.append(objective(passes.forward(batch, perturbed, index=index, train=train)))
                passes.gradient(values[-1], perturbed)
            for perturbation in perturbations.values():
                perturbation.ascend()
            logs |= pass_logs(t, perturbations, **{name: torch.stack(values).mean()})
        return logs

    def found(
        self, batch: Batch, passes: Passes, perturbations: Mapping[str, Perturbation]
    ) -> Iterator[tuple[bool, ModelOutput]]:
        """Yield the outputs of every view on the perturbations found, to train on, and whether it is the last."""
        views = len(self.views)
        for v, view in enumerate(self.views):
            for modality in view:
                perturbations[modality].frozen = True
            index = self.pass_index(self.config.steps * views + v + 1)
            yield v + 1 == views, passes.forward(batch, {m: perturbations[m] for m in view}, index=index)


def pass_logs(step: int, perturbations: Mapping[str, Perturbation], **values: Tensor) -> Logs:
    """Return the values of one pass under ``pass<step>/``, with every perturbation's size and gradient norm.

    Call it after the ascent step, so that the gradient norms are those of this pass.
    """
    logs = {f"pass{step}/{n}": value.detach() if value.requires_grad else value for n, value in values.items()}
    for modality, perturbation in perturbations.items():
        size = perturbation.relative_size
        if size is not None:
            logs[f"pass{step}/{modality}_delta"] = size
        if perturbation.gradient_norm is not None:
            logs[f"pass{step}/{modality}_gradient"] = perturbation.gradient_norm
    return logs
