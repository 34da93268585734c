"""``cost()`` of every trainer and option, against the operations that PyTorch counts in a step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_every_head import padded_batch
from tiny import RecordingPasses
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.facts import DataFacts
from villa.losses.classification import BinaryCrossEntropy
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter
from villa.trainers.base import forward_equivalents
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.noise import NoiseConfig, NoiseTrainer
from villa.trainers.pgd import FgmConfig, FgmTrainer, PgdConfig, PgdTrainer
from villa.trainers.rdrop import RDropConfig, RDropTrainer
from villa.trainers.smart import SmartConfig, SmartTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

BATCH = padded_batch("classification")


def model() -> Uniter:
    """Four layers, with dropout."""
    torch.manual_seed(0)
    config = UniterConfig(hidden_size=32, num_layers=4, num_heads=2, intermediate_size=64, max_positions=8)
    return Uniter.from_config(replace(config, padding_free="off"), DataFacts(30, 5, 6)).double().train()


class Counted(RecordingPasses):
    """Passes that count operations: of forward passes, of ways back to parameters, and of those to perturbations.

    Attention is made of matrix products, which PyTorch counts.
    """

    def __init__(self) -> None:
        super().__init__(model(), BinaryCrossEntropy())
        self.flops = {"forward": 0, "backward": 0, "ascent": 0}

    def _count(self, kind: str, run: Any) -> Any:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            result = run()
        self.flops[kind] += counter.get_total_flops()
        return result

    def forward(self, *given: Any, **named: Any) -> Any:
        return self._count("forward", lambda: super(Counted, self).forward(*given, **named))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._count("backward", lambda: super(Counted, self).backward(loss, last=last))

    def gradient(self, loss: Tensor, perturbations: Any, *, retain: bool = False) -> None:
        self._count("ascent", lambda: super(Counted, self).gradient(loss, perturbations, retain=retain))


@cache
def units(*modalities: str) -> dict[str, int]:
    """Operations of one pass of each kind; a perturbed image also has the way back through its first layer."""
    passes = Counted()
    passes.backward(passes.loss(passes.forward(BATCH), BATCH), last=True)
    deltas = {modality: Perturbation(AscentSettings(0.1)) for modality in modalities}
    again = Counted()
    again.gradient(again.loss(again.forward(BATCH, deltas), BATCH), deltas)
    assert passes.flops["forward"] == again.flops["forward"] > 0
    return {**passes.flops, "ascent": again.flops["ascent"]}


STEPS: dict[str, Any] = {"text_step_size": 0.1, "image_step_size": 0.1}
CASES: dict[str, Any] = {
    "standard": StandardTrainer(),
    "neftune": NoiseTrainer(NoiseConfig()),
    "r3f": NoiseTrainer(NoiseConfig(consistency_weight=1.0)),
    "rdrop": RDropTrainer(RDropConfig()),
    **{
        f"{name}_{modality}": kind(config(**STEPS, modality=modality, **options))
        for modality in ("image", "alternating")
        for name, kind, config, options in (
            ("fgm", FgmTrainer, FgmConfig, {}),
            ("fgm_2", FgmTrainer, FgmConfig, {"steps": 2}),
            ("pgd", PgdTrainer, PgdConfig, {}),
            ("pgd_clean", PgdTrainer, PgdConfig, {"clean_loss": True}),
            ("pgd_eval", PgdTrainer, PgdConfig, {"clean_loss": True, "init": "zero", "ascent_mode": "eval"}),
            ("smart", SmartTrainer, SmartConfig, {}),
            ("smart_0", SmartTrainer, SmartConfig, {"steps": 0}),
            ("proximal", SmartTrainer, SmartConfig, {"proximal_weight": 1.0}),
            ("detached", SmartTrainer, SmartConfig, {"steps": 2, "target": "detached"}),
            ("each", SmartTrainer, SmartConfig, {"target": "each"}),
            ("trades", SmartTrainer, SmartConfig, {"steps": 3, "ascent_mode": "eval", "direction": "forward"}),
            ("freelb", FreeLBTrainer, FreeLBConfig, {}),
            ("freelb_1", FreeLBTrainer, FreeLBConfig, {"steps": 1}),
            ("villa", VillaTrainer, VillaConfig, {}),
            ("official", VillaTrainer, VillaConfig, {"clean_loss": False, "init": "zero", "average_views": True}),
            ("villa_detached", VillaTrainer, VillaConfig, {"clean_logits": "detached", "clean_loss": False}),
            ("merged", VillaTrainer, VillaConfig, {"init": "zero", "dropout": "shared"}),
            ("merged_1", VillaTrainer, VillaConfig, {"init": "zero", "dropout": "shared", "steps": 1}),
            ("merged_detached", VillaTrainer, VillaConfig, {"init": "zero", "dropout": "shared", "kl_weight": 0.0}),
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_cost_is_the_number_of_operations(name: str) -> None:
    trainer, passes = CASES[name], Counted()
    trainer.step(BATCH, passes)
    forwards, backwards, *rest = trainer.cost()
    ascents = sum(rest)
    plain = units("text")
    assert passes.flops["forward"] == forwards * plain["forward"]
    views = getattr(trainer, "views", (("text",),))
    images = any("image" in view for view in views)
    # The way back to a perturbed image goes through one layer more, of 6 x 32 for each region.
    more = 2 * 6 * 32 * BATCH.region_mask.numel() if images and BATCH.region_mask is not None else 0
    assert 0 <= passes.flops["backward"] - backwards * plain["backward"] <= backwards * more
    if name.startswith("merged") or not ascents:
        together = [units(*trainer.modalities())["ascent"]] if ascents else []
    else:
        assert ascents % len(views) == 0
        together = [units(*view)["ascent"] for view in views] * (ascents // len(views))
    assert passes.flops["ascent"] == sum(together)
    equivalents = passes.flops["forward"] + passes.flops["backward"] + passes.flops["ascent"]
    # The first layers' own inputs have no way back, and attention has more of it than of a way there.
    assert equivalents / plain["forward"] == pytest.approx(forward_equivalents(trainer.cost()), rel=0.05)
