"""The loss of pre-training: dispatch, weights, what takes the place of the KL term, what is counted."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretraining_cases import objective_batch
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.losses.base import divergence
from villa.losses.pretraining import Pretraining, PretrainingConfig
from villa.models.base import ModelOutput
from villa.objectives import OBJECTIVES
from villa.registry import LOSSES

ROWS = {"mlm": (4, 30), "mrfr": (4, 6), "mrc": (4, 5), "mrc_kl": (4, 5), "itm": (3, 2), "itm_wra": (3, 2)}


def output_of(objective: str, seed: int = 0) -> ModelOutput:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS[objective], generator=source, dtype=torch.float64)
    transport = torch.rand(3, generator=source, dtype=torch.float64)
    return ModelOutput(logits, extras={"transport": transport} if objective == "itm_wra" else {})


def by_hand(objective: str, output: ModelOutput, batch: Batch) -> float:
    """Sums over rows, in plain Python."""
    assert batch.targets is not None
    logits, targets = output.logits, batch.targets
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    total = 0.0
    for row in range(len(logits)):
        if objective == "mrfr":
            total += sum((logits[row, i] - targets[row, i]).item() ** 2 for i in range(6)) / 6
        elif objective == "mrc":
            best = max(range(1, 5), key=lambda c: targets[row, c].item())
            total -= log_p[row, best].item()
        elif objective == "mrc_kl":
            pairs = zip(targets[row].tolist(), log_p[row].tolist(), strict=True)
            total += sum(t * (math.log(t) - p) for t, p in pairs) / 5
        else:
            total -= log_p[row, int(targets[row])].item()
    total /= len(logits)
    if objective == "itm_wra":
        first, second, third = output.extras["transport"].tolist()
        total += 0.1 * (first - second + third) / 3
    return total


@pytest.mark.parametrize("objective", ROWS)
def test_each_objective_is_its_mean(objective: str) -> None:
    batch, output, loss = objective_batch(objective), output_of(objective), Pretraining()
    assert loss(output, batch).item() == pytest.approx(by_hand(objective, output, batch), rel=1e-12)
    assert loss.count(batch) == ROWS[objective][0]


def test_the_background_is_nobodys_class() -> None:
    batch, output = objective_batch("mrc"), output_of("mrc")
    assert batch.targets is not None
    background = torch.zeros(4, 5, dtype=torch.float64)
    background[:, 0], background[:, 3] = 0.9, 0.1
    value = Pretraining()(output, replace(batch, targets=background))
    torch.testing.assert_close(value, F.cross_entropy(output.logits, torch.full((4,), 3)))
    hard = Pretraining()(output, replace(batch, targets=torch.full((4,), 3)))
    torch.testing.assert_close(hard, value)


def test_a_certain_detector_has_a_finite_divergence() -> None:
    batch, output = objective_batch("mrc_kl"), output_of("mrc_kl")
    certain = F.one_hot(torch.tensor([0, 1, 2, 3]), 5).double()
    value = Pretraining()(output, replace(batch, targets=certain))
    torch.testing.assert_close(value, F.cross_entropy(output.logits, certain) / 5)


@pytest.mark.parametrize("objective", ROWS)
def test_a_weight_scales_the_loss_and_its_divergence(objective: str) -> None:
    batch, output, clean = objective_batch(objective), output_of(objective), output_of(objective, 1)
    plain, weighted = Pretraining(), Pretraining(PretrainingConfig(weights={objective: 2.5, "qa": 7.0}))
    torch.testing.assert_close(weighted(output, batch), 2.5 * plain(output, batch))
    torch.testing.assert_close(
        weighted.consistency(output, clean, batch), 2.5 * plain.consistency(output, clean, batch)
    )


@pytest.mark.parametrize("objective", ROWS)
def test_divergences(objective: str) -> None:
    """Distributions: the symmetric KL of their rows. Features: the mean squared difference."""
    batch, output, clean = objective_batch(objective), output_of(objective), output_of(objective, 1)
    loss = Pretraining()
    for reduction in ("batchmean", "mean"):
        found = loss.consistency(output, clean, batch, reduction)
        if objective == "mrfr":
            expected: Tensor = (output.logits - clean.logits).square().mean()
        else:
            expected = divergence(output.logits, clean.logits, reduction)
        torch.testing.assert_close(found, expected)
    assert loss.consistency(output, output, batch) == 0


def test_the_weight_of_the_alignment_is_an_option() -> None:
    batch, output = objective_batch("itm_wra"), output_of("itm_wra")
    without = Pretraining(PretrainingConfig(transport_weight=0.0))(output, batch)
    torch.testing.assert_close(without, Pretraining()(output, replace(batch, objective="itm")))
    with pytest.raises(DataError, match="itm_wra' needs a model that aligns"):
        Pretraining()(ModelOutput(output.logits), batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": None}, "names no objective; known: mlm, mrfr"),
        ({"objective": "mml"}, "names objective 'mml'"),
        ({"targets": torch.zeros(3, 6)}, r"needs the features of the masked regions, \[4, 6\], as targets"),
        ({"targets": None}, "given: none"),
        ({"targets": torch.zeros(0, 6)}, "asks for nothing"),
    ],
)
def test_batches_that_cannot_be_scored_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pretraining()(output_of("mrfr"), replace(objective_batch("mrfr"), **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"itn": 1.0}}, r"loss.weights names 'itn', .* did you mean 'itm'"),
        ({"weights": {"itm": -1.0}}, "loss.weights.itm is -1.0"),
        ({"transport_weight": math.inf}, "loss.transport_weight is inf"),
        ({"region_weight": math.nan}, "loss.region_weight is nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainingConfig(**options).check()


def test_the_registered_loss_knows_every_objective() -> None:
    assert LOSSES.get("pretraining") is Pretraining
    assert Pretraining()._terms.keys() == {objective.loss for objective in OBJECTIVES.values()}
