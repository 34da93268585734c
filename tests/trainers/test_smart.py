"""SMART, written against the contract alone, equals a loop by hand."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from shapes.model import AverageModel
from shapes.smart import SmartConfig, SmartTrainer
from tiny import RecordingPasses, gradients, tiny_batch, tiny_model
from torch import Tensor
from updaters import cut, make

from villa.batch import Batch


def scores(model: AverageModel, batch: Batch, delta: Tensor | None = None) -> Tensor:
    """Logits, the perturbation being added to the embeddings."""
    assert batch.attention_mask is not None
    assert batch.region_mask is not None
    words, regions = model.words(batch.input_ids), model.regions(batch.features)
    words = words if delta is None else words + delta
    text, image = (
        (values * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        for values, mask in ((words, batch.attention_mask), (regions, batch.region_mask))
    )
    logits: Tensor = model.head(torch.cat((text, image), -1))
    return logits


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(p||q) + KL(q||p), the mean over examples."""
    log_p, log_q = logits.log_softmax(-1), clean.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def by_hand(model: AverageModel, batch: Batch, config: SmartConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Back-propagate SMART's loss; return it with the divergence."""
    assert batch.attention_mask is not None
    mask = batch.attention_mask.unsqueeze(-1)
    shape = (*batch.attention_mask.shape, model.words.embedding_dim)
    delta = torch.zeros(shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))
    delta = delta * mask * config.noise
    with torch.no_grad():
        target = scores(model, batch)
    for _ in range(config.steps):
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(divergence(scores(model, batch, delta), target), delta)
        slope = slope * mask
        step = config.step_size * slope / slope.abs().amax((1, 2), keepdim=True).clamp_min(1e-8)
        delta = (delta.detach() + step).clamp(-config.radius, config.radius)
    clean = scores(model, batch)
    smoothness = divergence(scores(model, batch, delta), clean)
    loss = F.cross_entropy(clean, batch.targets)
    (loss + config.weight * smoothness).backward()
    return loss, smoothness


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_smart_equals_a_loop_by_hand(steps: int) -> None:
    config = SmartConfig(steps=steps, step_size=0.1, noise=0.05, radius=0.15, weight=2.0)
    ours, theirs, batch = tiny_model(), tiny_model(), tiny_batch()
    passes = RecordingPasses(ours)
    logs = SmartTrainer(config).step(batch, passes)
    loss, smoothness = by_hand(theirs, batch, config, passes.seed("smart"))
    torch.testing.assert_close(logs["loss"], loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(logs["divergence"], smoothness.detach(), rtol=1e-9, atol=0)
    assert smoothness > 1e-6
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-9, atol=1e-14)


def test_an_update_of_several_micro_batches_is_the_mean_of_them() -> None:
    config = SmartConfig(steps=2, step_size=0.1, noise=0.05, radius=0.15)
    model = tiny_model()
    before, parts = copy.deepcopy(model), cut(tiny_batch(), (4, 2))
    updater = make(model, SmartTrainer(config))
    updater.update(1, parts)
    expected = copy.deepcopy(before)
    for place, (part, share) in enumerate(zip(parts, (4 / 6, 2 / 6), strict=True)):
        alone = copy.deepcopy(before)
        updater.passes.begin(1, place, 1.0)
        by_hand(alone, part, config, updater.passes.seed("smart"))
        for parameter, other in zip(expected.parameters(), alone.parameters(), strict=True):
            assert other.grad is not None
            parameter.data -= share * other.grad
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-14)


def test_it_costs_what_it_says_and_takes_few_lines() -> None:
    passes = RecordingPasses(tiny_model())
    trainer = SmartTrainer(SmartConfig(steps=2))
    trainer.step(tiny_batch(), passes)
    forwards, backwards, ascents = trainer.cost()  # type: ignore[misc]
    assert (forwards, backwards) == (len(passes.outputs), 2 * len(passes.backwards))  # one goes through two graphs
    assert ascents == len(passes.ascents) == 2
    assert trainer.relative_cost() == pytest.approx((4 + 2 * 2 + 2) / 3)
    source = inspect.getsource(SmartConfig) + inspect.getsource(SmartTrainer)
    assert len(source.splitlines()) < 60
