"""Time and FLOPs of an update by method, relative to standard training, and to the released loop.

    python tools/benchmarks/methods.py                      # 4 layers of 128
    python tools/benchmarks/methods.py --size base          # UNITER-base: minutes on a CPU

Every method runs in turn, round after round, and the median over rounds of the ratio within a round is shown, so
that a machine whose speed drifts does not matter. FLOPs are counted by torch. ``released loop`` back-propagates the
clean graph in every pass, as the released code does; its gradients equal those of ``villa text``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from villa.batch import Batch
from villa.engine.passes import ModelPasses, Precision
from villa.facts import DataFacts
from villa.losses.base import divergence
from villa.losses.classification import CrossEntropy
from villa.models.base import Model
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter
from villa.trainers.base import Logs, Passes, Trainer, forward_equivalents
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer


class ReleasedLoop(VillaTrainer):
    """VILLA on the text as released: every pass sends its KL gradient through the clean graph at once."""

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run K passes, each with a backward through its own graph and the clean one."""
        clean = passes.forward(batch)
        deltas = self.perturbations(passes)
        for t in range(self.config.steps):
            output = passes.forward(batch, deltas, index=t + 1)
            kl = divergence(output.logits, clean.logits)
            loss = (passes.loss(output, batch) + self.config.kl_weight * kl) / self.config.steps
            torch.autograd.backward(loss, retain_graph=True)
            self.move(deltas, passes, t)
        return {}

    def cost(self) -> tuple[int, int]:
        """A clean forward besides K passes; every pass goes back through two graphs."""
        return self.config.steps + 1, 2 * self.config.steps


def methods() -> dict[str, Trainer]:
    """The methods to compare."""
    text = VillaConfig(modality="text", init="zero", clean_loss=False)
    return {
        "standard": StandardTrainer(),
        "freelb": FreeLBTrainer(FreeLBConfig()),
        "villa text": VillaTrainer(text),
        "villa text, detached": VillaTrainer(replace(text, clean_logits="detached")),
        "villa both": VillaTrainer(replace(text, modality="both")),
        "villa alternating": VillaTrainer(replace(text, modality="alternating")),
        "released loop": ReleasedLoop(text),
    }


def make(size: str, examples: int, tokens: int, regions: int) -> tuple[Model, Batch]:
    """A UNITER with a VQA head without dropout, and a random batch without padding."""
    small = {"hidden_size": 128, "num_layers": 4, "num_heads": 4} if size == "small" else {"size": size}
    config = UniterConfig(**small, hidden_dropout=0.0, attention_dropout=0.0)
    width = 1280 if size == "small" else 2048
    torch.manual_seed(0)
    model = Uniter.from_config(config, DataFacts(vocab_size=28996, num_labels=13, feature_dim=width))
    batch = Batch(
        ids=[str(i) for i in range(examples)],
        input_ids=torch.randint(1, 28996, (examples, tokens)),
        attention_mask=torch.ones(examples, tokens, dtype=torch.bool),
        features=torch.randn(examples, regions, width),
        boxes=torch.rand(examples, regions, 4),
        region_mask=torch.ones(examples, regions, dtype=torch.bool),
        targets=torch.randint(0, 13, (examples,)),
    )
    return model, batch


def runner(model: Model, batch: Batch, trainer: Trainer) -> Callable[[], None]:
    """An update without the optimiser: all passes of one micro-batch."""
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", torch.device("cpu")), seed=0)
    passes.begin(1, 0, 1.0)

    def update() -> None:
        model.zero_grad(set_to_none=True)
        trainer.step(batch, passes)

    return update


def flops(update: Callable[[], None]) -> int:
    """Floating point operations of an update's matrix products."""
    with FlopCounterMode(display=False) as counter:
        update()
    return int(counter.get_total_flops())


def gradient(model: Model) -> Tensor:
    """All gradients of a model in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "base", "large"), default="small")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model, batch = make(options.size, options.examples, options.tokens, options.regions)
    trainers = methods()
    updates = {name: runner(model, batch, trainer) for name, trainer in trainers.items()}
    counted = {name: flops(update) for name, update in updates.items()}
    gradients = {}
    for name in ("villa text", "released loop"):
        updates[name]()
        gradients[name] = gradient(model)
    times: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(options.rounds):
        for name, update in updates.items():
            started = time.perf_counter()
            update()
            times[name].append(time.perf_counter() - started)
    print("| method | forward | backward | equivalents | GFLOP | FLOP ratio | time ratio | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, trainer in trainers.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times["standard"], strict=True))
        cost = trainer.cost()
        print(
            f"| {name} | {cost[0]} | {cost[1]} | {forward_equivalents(cost)} | {counted[name] / 1e9:.1f} | "
            f"{counted[name] / counted['standard']:.2f} | {ratio:.2f} | {1e3 * statistics.median(times[name]):.0f} |"
        )
    difference = (gradients["villa text"] - gradients["released loop"]).norm() / gradients["released loop"].norm()
    print(f"\nvilla text against the released loop: gradients differ by {difference:.1e} (relative norm)")


if __name__ == "__main__":
    main()
