"""The metrics of pre-training, each of its own objectives, and the losses beside them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from villa.batch import Batch
from villa.engine.evaluator import Evaluator
from villa.engine.passes import Precision
from villa.errors import DataError
from villa.losses.pretraining import Pretraining
from villa.models.base import ModelOutput
from villa.registry import METRICS

NAMES = ("mlm_accuracy", "itm_accuracy", "mrc_accuracy")


def batch(objective: str, targets: Tensor | None) -> Batch:
    count = 1 if targets is None else len(targets)
    return Batch(ids=[str(i) for i in range(count)], objective=objective, targets=targets)


def output(rows: list[list[float]]) -> ModelOutput:
    return ModelOutput(logits=torch.tensor(rows))


CASES: dict[str, tuple[list[list[float]], Tensor, str, float]] = {
    "mlm": ([[0, 2, 1], [3, 0, 0], [0, 0, 1]], torch.tensor([1, 0, 0]), "mlm_accuracy", 2 / 3),
    "itm_wra": ([[0, 2], [3, 0]], torch.tensor([1, 1]), "itm_accuracy", 0.5),
    # column 0 is the background: the detector's class is 2 in the first row, though 0 is likelier
    "mrc_kl": ([[0, 1, 2], [0, 3, 0]], torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.1, 0.7]]), "mrc_accuracy", 0.5),
    "mrc": ([[0, 1, 2], [0, 3, 0]], torch.tensor([2, 1]), "mrc_accuracy", 1.0),
}


@pytest.mark.parametrize("objective", CASES)
def test_a_metric_scores_its_objectives_and_passes_over_others(objective: str) -> None:
    rows, targets, wanted, score = CASES[objective]
    for name in NAMES:
        metric = METRICS.get(name)()
        metric.update(output(rows), batch(objective, targets))
        metric.update(output([[1.0]]), batch("mrfr", torch.ones(1, 1)))
        assert metric.compute() == ({name: pytest.approx(score)} if name == wanted else {})


def test_missing_targets_are_an_error() -> None:
    with pytest.raises(DataError, match="metric 'mlm_accuracy': the examples have no targets"):
        METRICS.get("mlm_accuracy")().update(output([[1.0]]), batch("mlm", None))


class Fixed(torch.nn.Module):
    """Gives the outputs that it was made with, one after another."""

    def __init__(self, outputs: list[ModelOutput]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, batch: Batch) -> ModelOutput:
        return next(self.outputs)


def evaluate(*given: tuple[list[list[float]], Batch]) -> dict[str, float]:
    model: Any = Fixed([output(rows) for rows, _ in given])
    metrics = {name: METRICS.get(name)() for name in NAMES}
    evaluator = Evaluator(model, Pretraining(), metrics, Precision("fp32", torch.device("cpu")))
    return evaluator.evaluate(batch for _, batch in given)


def test_each_objective_has_its_loss_and_the_loss_is_their_mean() -> None:
    found = evaluate(
        ([[1.0, 3.0]], batch("mrfr", torch.tensor([[0.0, 0.0]]))),  # 5, of one row
        ([[0.0, 0.0], [0.0, 0.0]], batch("itm", torch.tensor([0, 1]))),  # log 2
        ([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]], batch("mrfr", torch.zeros(3, 2))),  # 4, of three rows
    )
    itm, mrfr = torch.tensor(2.0).log().item(), (5 + 3 * 4) / 4
    assert found == pytest.approx(
        {"loss": (itm + mrfr) / 2, "mrfr_loss": mrfr, "itm_loss": itm, "itm_accuracy": 0.5}, rel=1e-6
    )


def test_one_objective_alone_has_no_second_name() -> None:
    assert evaluate(([[0.0, 0.0]], batch("itm", torch.tensor([0])))).keys() == {"loss", "itm_accuracy"}
