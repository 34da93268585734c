"""CPU time that the loop adds to an update and to a pass of a bare loop with the same mathematics.

    python tools/benchmarks/loop.py

The model takes a few microseconds, so that the rest is the loop's own: random state, injection, logs, checks. An update
of each method runs in turn with its bare counterpart; the shortest time over all rounds is shown, which other processes
of the machine disturb least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.batch import Batch
from villa.config.schema import TrainingConfig
from villa.engine.fused_adam import FusedAdam
from villa.engine.parameter_groups import parameter_groups
from villa.engine.passes import ModelPasses, Precision
from villa.engine.schedules import ConstantSchedule, ScheduleConfig
from villa.engine.updater import Updater
from villa.facts import DataFacts
from villa.losses.classification import CrossEntropy
from villa.models.base import Model, ModelOutput, Point
from villa.trainers.base import Trainer
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer

#: Length of an ascent step, and updates that are timed at once.
_STEP, _UPDATES = 0.01, 10


class Small(Model):
    """Mean of word embeddings, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    @classmethod
    def from_config(cls, config: Any, facts: DataFacts) -> Small:
        """Build the model."""
        return cls()

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Return the logits."""
        return ModelOutput(self.head(self.words(batch.input_ids).mean(1)))

    def perturbation_points(self) -> dict[str, Point]:
        """Perturb the embeddings."""
        return {"text": Point("words", "output", mask=lambda batch: batch.attention_mask)}

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the head's prefix."""
        return ("head.",)


def bare(model: Small, batch: Batch, optimizer: torch.optim.Optimizer, passes: int) -> Callable[[], None]:
    """An update without the loop: a clean pass if ``passes`` is 0, otherwise FreeLB's perturbed ones."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.targets is not None
    ids, mask, targets = batch.input_ids, batch.attention_mask.unsqueeze(-1), batch.targets

    def predict(delta: Tensor | None) -> Tensor:
        words = model.words(ids)
        logits: Tensor = model.head((words if delta is None else words + delta).mean(1))
        return logits

    def update() -> None:
        torch.default_generator.manual_seed(1)
        delta = torch.zeros(*ids.shape, 8) if passes else None
        for step in range(passes or 1):
            moves = step + 1 < passes
            if delta is not None:
                delta = delta.detach().requires_grad_(moves)
            torch.autograd.backward(F.cross_entropy(predict(delta), targets) / (passes or 1))
            if moves and delta is not None:
                assert delta.grad is not None
                gradient = delta.grad * passes * mask
                norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, 1, 1).clamp_min(1e-8)
                delta = delta.detach() + _STEP * gradient / norms
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()

    return update


def looped(model: Small, batch: Batch, optimizer: torch.optim.Optimizer, trainer: Trainer) -> Callable[[], None]:
    """The same update in villa's loop."""
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", torch.device("cpu")), seed=0)
    schedule = ConstantSchedule(ScheduleConfig(), 10)
    updater = Updater(passes, trainer, optimizer, schedule, TrainingConfig(clip_norm=1.0))

    def update() -> None:
        updater.update(1, [batch])

    return update


def microseconds(update: Callable[[], None]) -> float:
    """CPU time of an update."""
    started = time.process_time()
    for _ in range(_UPDATES):
        update()
    return 1e6 * (time.process_time() - started) / _UPDATES


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    batch = Batch(
        ids=[str(i) for i in range(4)],
        input_ids=torch.randint(50, (4, 6)),
        attention_mask=torch.ones(4, 6, dtype=torch.bool),
        targets=torch.randint(3, (4,)),
    )
    print("| update | bare, µs | villa, µs | added, µs |")
    print("|---|---|---|---|")
    added: dict[int, float] = {}
    for passes in (0, 1, 2, 5):
        model = Small()
        optimizer = FusedAdam(parameter_groups(model, lr=1e-5, weight_decay=0.01))
        options = FreeLBConfig(steps=passes or 1, modality="text", init="zero", text_step_size=_STEP)
        trainer: Trainer = FreeLBTrainer(options) if passes else StandardTrainer()
        updates = bare(model, batch, optimizer, passes), looped(model, batch, optimizer, trainer)
        times = [[microseconds(update) for update in updates] for _ in range(rounds)]
        plain, villa = (min(column) for column in zip(*times, strict=True))
        added[passes] = villa - plain
        name = f"{passes} perturbed passes" if passes else "standard"
        print(f"| {name} | {plain:.0f} | {villa:.0f} | {added[passes]:.0f} |")
    print(f"\nadded to a standard update {added[0]:.0f} µs, to a pass {(added[5] - added[2]) / 3:.0f} µs")


if __name__ == "__main__":
    main()
