"""Robust image encoders of dual encoders: FARE without labels, and TeCoA against the texts of classes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from villa.adversarial.ascent import Norm
from villa.batch import Batch
from villa.errors import ConfigError
from villa.models.base import Model, ModelOutput
from villa.registry import register_trainer
from villa.trainers.adversarial import Modality, SearchConfig, SearchTrainer, pass_logs
from villa.trainers.base import Cost, Logs, Passes, TrainerConfig
from villa.trainers.pgd import PgdConfig, PgdTrainer


@dataclass
class PixelConfig(SearchConfig):
    """Options of ascents on pixels as in the recipe of FARE's authors."""

    steps: int = 10
    points: dict[str, Any] = field(default_factory=lambda: {"image": "pixels"})
    image_step_size: float = 1 / 255
    image_radius: float | None = 4 / 255
    norm: Norm = "linf"
    step: str = "sign"
    momentum: float = 0.9
    ascent_mode: Literal["train", "eval"] = "eval"


@dataclass
class FareConfig(PixelConfig):
    """Options of FARE, besides those of ``SearchConfig``: ascents on pixels as in the authors' recipe.

    Attributes:
        modality: only images are perturbed.
    """

    modality: Literal["image"] = "image"


@register_trainer("fare")
class FareTrainer(SearchTrainer):
    """FARE (Schlarmann et al., ICML 2024): |f(x + delta_K) - f0(x)|^2, where f embeds images and f0 is f at the start.

    Neither labels nor texts are read. The weights of the start are part of every checkpoint.
    """

    Config: ClassVar[type[TrainerConfig]] = FareConfig
    config: FareConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Embed the images by the weights of the start, ascend the distance from that K times, and train on it."""
        if not self.perturbs(batch):
            return self.clean_step(batch, passes)
        images = images_of(batch)
        fixed, deltas = features(passes.reference(images, train=False)), self.perturbations(passes)
        logs = self.search(images, passes, deltas, lambda output: distance(output, fixed), "distance")
        for last, output in self.found(images, passes, deltas):
            loss = distance(output, fixed)
            passes.backward(self.config.weight * loss, last=last)
        logs |= pass_logs(self.config.steps, deltas, distance=loss)
        return {"loss": self.config.weight * loss.detach(), **logs}

    def cost(self) -> Cost:
        """Return the pass at the start's weights, the ascents, and the trained pass; of images alone."""
        return 2 + self.config.steps, 1, self.config.steps

    def cost_of(self, objective: str) -> Cost:
        """Return the cost of an objective."""
        return self.cost() if self.asks_for(objective) else (2, 1)

    def clean_step(self, batch: Batch, passes: Passes) -> Logs:
        """Train on the distance of clean images, whose texts are not read either."""
        images = images_of(batch)
        fixed = features(passes.reference(images, train=False))
        loss = self.config.weight * distance(passes.forward(images), fixed)
        passes.backward(loss, last=True)
        return {"loss": loss.detach()}

    def reference_decay(self, progress: float) -> float:
        """Keep the weights of the start as they are."""
        return 1.0

    def check(self, model: Model) -> None:
        """Refuse models that do not embed images by themselves."""
        if not model.embeds_images():
            raise ConfigError(
                f"trainer '{self.config.name}' compares embeddings of images, but {type(model).__name__} has none of "
                "images alone here; use a dual encoder (model.name=huggingface with CLIP, SigLIP, ... and "
                "dataset.target=pair or dataset.label_prompt), or trainer=smart, which compares predictions"
            )
        super().check(model)


@dataclass
class TecoaConfig(PixelConfig, PgdConfig):
    """Options of TeCoA: those of PGD, with ascents on pixels as in the recipe that FARE's authors compare with.

    Attributes:
        modality: only images are perturbed.
    """

    modality: Modality = "image"


@register_trainer("tecoa")
class TecoaTrainer(PgdTrainer):
    """TeCoA (Mao et al., ICLR 2023): PGD on pixels; images are scored against the texts of all classes, which stay."""

    Config: ClassVar[type[TrainerConfig]] = TecoaConfig

    def check(self, model: Model) -> None:
        """Refuse models that do not score images against the texts of classes."""
        if not model.scores_label_texts():
            raise ConfigError(
                f"trainer '{self.config.name}' scores images against texts of classes, of which there are none: set "
                "dataset.target=class and dataset.label_prompt='a photo of a {label}', with a dual encoder "
                "(model.name=huggingface); or use trainer=fare, which needs no classes"
            )
        super().check(model)


def images_of(batch: Batch) -> Batch:
    """Return a batch without its texts."""
    return replace(batch, input_ids=None, attention_mask=None, token_type_ids=None)


def features(output: ModelOutput) -> Tensor:
    """Return the embeddings of images ``[B, D]`` in fp32 or wider."""
    assert output.image_features is not None, "the model was not checked"
    return output.image_features.to(torch.promote_types(output.image_features.dtype, torch.float32))


def distance(output: ModelOutput, fixed: Tensor) -> Tensor:
    """Return the squared l2 distance between embeddings of images ``[B, D]``, the mean over images."""
    return (features(output) - fixed).square().sum(-1).mean()
