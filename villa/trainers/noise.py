"""Training on noisy embeddings: NEFTune, and R3F with its divergence from the clean prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from villa.adversarial.ascent import AscentSettings, Norm
from villa.batch import Batch
from villa.objectives import check_objectives
from villa.registry import register_trainer
from villa.trainers.adversarial import AdversarialTrainer, PerturbationConfig, check_finite, pass_logs
from villa.trainers.base import Logs, Passes, TrainerConfig


@dataclass
class NoiseConfig(PerturbationConfig):
    """Options of training on noise.

    Attributes:
        preset: sets ``norm``, ``text_noise`` and ``consistency_weight`` as in ``neftune`` or ``r3f``; an option given
            explicitly wins.
        modality: what gets noise: ``text``, ``image`` or ``both``.
        points: where a modality gets noise, ``embeddings`` by default; see ``villa_run --help trainer=pgd``.
        text_noise: size of the noise on word embeddings. With ``l2``, entries are drawn up to ``text_noise`` over the
            square root of the number of an example's entries (NEFTune's alpha); with ``linf`` up to ``text_noise``.
        image_noise: the same for region features.
        norm: ``l2`` or ``linf``.
        distribution: ``uniform``, or ``normal`` with that standard deviation.
        consistency_weight: weight of the divergence from the clean prediction. If above 0, the task loss is that of
            the clean pass (R3F); at 0 it is that of the noisy one, and there is no clean pass (NEFTune).
        mask_padding: padding gets no noise and does not count as entries.
        dropout: ``fresh`` masks in every pass, or ``shared`` by both.
        objectives: in pre-training, the objectives that are trained on noise; None is all.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "neftune": {"norm": "l2", "text_noise": 5.0, "consistency_weight": 0.0},
        "r3f": {"norm": "linf", "text_noise": 1e-5, "consistency_weight": 1.0},
    }

    preset: Literal["neftune", "r3f"] = "neftune"
    modality: Literal["text", "image", "both"] = "text"
    points: dict[str, Any] = field(default_factory=dict)
    text_noise: float = 5.0
    image_noise: float = 5.0
    norm: Norm = "l2"
    distribution: Literal["uniform", "normal"] = "uniform"
    consistency_weight: float = 0.0
    mask_padding: bool = True
    dropout: Literal["fresh", "shared"] = "fresh"
    objectives: list[str] | None = None

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        check_objectives("trainer.objectives", self.objectives or ())
        self.check_points()
        check_finite(self, "text_noise", "image_noise", "consistency_weight")

    def ascent(self, key: str) -> AscentSettings:
        """Return the settings of one point's noise, which never moves."""
        scale = getattr(self, f"{key.partition('.')[0]}_noise")
        return AscentSettings(0.0, None, self.norm, self.distribution, scale, self.mask_padding)


@register_trainer("noise")
class NoiseTrainer(AdversarialTrainer):
    """NEFTune (Jain et al., ICLR 2024): L(f(x + noise), y).

    With a consistency weight w, R3F (Aghajanyan et al., ICLR 2021): L(f(x), y) + w D(f(x), f(x + noise)).
    """

    Config: ClassVar[type[TrainerConfig]] = NoiseConfig
    config: NoiseConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run the noisy pass, and for R3F the clean one."""
        if not self.perturbs(batch):
            return self.clean_step(batch, passes)
        noise, weight = self.perturbations(passes), self.config.consistency_weight
        for perturbation in noise.values():
            perturbation.frozen = True
        clean = passes.forward(batch, index=0) if weight else None
        noisy = passes.forward(batch, noise, index=self.pass_index(0 if clean is None else 1))
        loss = passes.loss(noisy if clean is None else clean, batch)
        total, logs = loss, Logs()
        if clean is not None:
            divergence = passes.consistency(noisy, clean, batch)
            total, logs = loss + weight * divergence, {"clean_loss": loss, "divergence": divergence}
        passes.backward(total, last=True)
        logs = {"loss": total, **logs}
        return {name: value.detach() for name, value in logs.items()} | pass_logs(0, noise)

    def cost(self) -> tuple[int, int]:
        """Return one forward and one backward pass, or two for R3F."""
        return (2, 2) if self.config.consistency_weight else (1, 1)
