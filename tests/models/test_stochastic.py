"""Whether a model says that its training passes draw random numbers, and whether they do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from random_batches import random_batch

from villa.batch import Batch
from villa.config.schema import RunConfig
from villa.engine.setup import build_trainer
from villa.facts import DataFacts
from villa.models.base import Model
from villa.models.lxmert import Lxmert, LxmertConfig
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter
from villa.models.vilt import Vilt, ViltConfig
from villa.models.visual_bert import VisualBert, VisualBertConfig
from villa.trainers.adversarial import AdversarialTrainer
from villa.trainers.villa import VillaConfig

FACTS = DataFacts(vocab_size=50, num_labels=2, feature_dim=8)
SIZES: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "max_positions": 16}
LXMERT: dict[str, Any] = {"language_layers": 1, "vision_layers": 1, "cross_layers": 1}


def uniter(**options: Any) -> tuple[Model, Batch]:
    return Uniter.from_config(UniterConfig(**SIZES, **options, num_layers=1), FACTS), random_batch()


def paired(**options: Any) -> tuple[Model, Batch]:
    config = UniterConfig(**SIZES, **options, num_layers=1, head="nlvr2_paired_attn")
    return Uniter.from_config(config, FACTS), random_batch((3, 7), (3, 2, 5))


def lxmert(**options: Any) -> tuple[Model, Batch]:
    return Lxmert.from_config(LxmertConfig(**SIZES, **options, **LXMERT), FACTS), random_batch()


def visual_bert(**options: Any) -> tuple[Model, Batch]:
    return VisualBert.from_config(VisualBertConfig(**SIZES, **options, num_layers=1), FACTS), random_batch()


def vilt(**options: Any) -> tuple[Model, Batch]:
    config = ViltConfig(**SIZES, **options, num_layers=1, image_size=8, patch_size=4)
    pixels = torch.randn(3, 3, 8, 12)
    return Vilt.from_config(config, FACTS), replace(random_batch(), features=None, pixel_values=pixels)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("build", [uniter, paired, lxmert, visual_bert, vilt])
def test_a_model_draws_random_numbers_if_it_says_so(build: Any, rates: tuple[float, float]) -> None:
    model, batch = build(hidden_dropout=rates[0], attention_dropout=rates[1])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.train()(batch)
    assert model.stochastic() == any(rates) == (not torch.equal(torch.get_rng_state(), before))


@pytest.mark.parametrize(
    ("init", "rate", "merged"), [("zero", 0.0, True), ("zero", 0.1, False), ("uniform", 0.0, False)]
)
def test_without_dropout_a_zero_start_runs_the_clean_pass_once(init: Any, rate: float, merged: bool) -> None:
    model, _ = uniter(hidden_dropout=rate, attention_dropout=rate)
    trainer = build_trainer(RunConfig(trainer=VillaConfig(name="villa", init=init)), model)
    assert isinstance(trainer, AdversarialTrainer)
    assert trainer.merged == merged
