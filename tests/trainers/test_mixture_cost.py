"""The cost of a mixture: what a micro-batch of each objective really runs, averaged over updates."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from pretraining_cases import objective_batch, tiny_config
from tiny import RecordingPasses
from torch import Tensor

from villa.facts import DataFacts
from villa.losses.pretraining import Pretraining
from villa.models.uniter.model import Uniter
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

NAMED: dict[str, Any] = {"objectives": ["mlm", "itm"]}
#: The clean pass is back-propagated where its KL term or its loss is used.
DETACHED = VillaConfig(modality="text", clean_loss=False, kl_weight=1.5, kl_weights={"mlm": 0.0}, **NAMED)
TRAINERS = [
    StandardTrainer(),
    FreeLBTrainer(FreeLBConfig(steps=2, modality="both", **NAMED)),
    VillaTrainer(VillaConfig(modality="alternating", **NAMED)),
    VillaTrainer(DETACHED),
    VillaTrainer(VillaConfig(modality="text")),
]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_objective_runs_as_many_passes_as_are_counted(trainer: Any) -> None:
    for objective in ("mlm", "mrfr", "itm"):
        sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
        model = Uniter.from_config(tiny_config(**sizes), DataFacts(30, 5, 6)).double()
        counts = Counter[str]()

        def count(_: Any, __: Any, output: Tensor, counts: Counter[str] = counts) -> None:
            counts["forward"] += 1
            if output.requires_grad:
                output.register_hook(lambda _: counts.update(["backward"]))

        model.uniter.embeddings.word_embeddings.register_forward_hook(count)
        trainer.step(objective_batch(objective), RecordingPasses(model, Pretraining()))
        assert (counts["forward"], counts["backward"]) == trainer.cost_of(objective), objective


def test_the_cost_of_a_mixture_is_the_mean_over_its_updates() -> None:
    """Of the paper's VILLA, 7 times standard training where it perturbs, 1 where it does not."""
    paper = VillaTrainer(VillaConfig(modality="alternating", **NAMED))
    assert paper.relative_cost({"mlm": 2, "mrfr": 1, "mrc_kl": 1, "itm": 2}) == pytest.approx((4 * 7 + 2 * 1) / 6)
    assert paper.relative_cost({"mrfr": 3}) == 1
    assert paper.relative_cost({"mlm": 0.2}) == pytest.approx(7)
    assert paper.relative_cost() == paper.relative_cost({}) == 7  # a task
    # Without its KL term, the clean pass of `mlm` is not back-propagated: 4 + 2 * 3 instead of 4 + 2 * 4.
    assert VillaTrainer(DETACHED).relative_cost({"mlm": 1, "itm": 1, "mrfr": 2}) == pytest.approx((10 + 12 + 6) / 12)
    assert StandardTrainer().relative_cost({"mlm": 1, "mrfr": 5}) == 1
