"""Attacks against models whose worst cases are known."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny import CPU, tiny_batch, tiny_model
from torch import Tensor, nn

from villa.adversarial.perturbation import Perturbation
from villa.analysis.checks import checks, extra_cases
from villa.analysis.robustness import Case, Outcome, attack, interval
from villa.analysis.victim import HeldOut, Measure, Victim, margin
from villa.batch import Batch
from villa.config.schema import RobustnessConfig
from villa.engine.passes import ModelPasses, Precision
from villa.evaluation.metrics import Accuracy
from villa.losses.classification import CrossEntropy
from villa.models.base import DataFacts, Model, ModelOutput, Point

WIDTH, TOKENS, COUNT = 6, 4, 40


class Plane(Model):
    """Two classes on the sides of a plane through the embeddings of all real tokens, whose distance is known."""

    def __init__(self, scale: float = 1.0, step: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(50, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.scale, self.step = scale, step
        self.double()

    @classmethod
    def from_config(cls, config: Any, facts: DataFacts) -> Model:
        raise NotImplementedError

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        assert batch.input_ids is not None
        assert batch.attention_mask is not None
        side = self.embed(batch.input_ids)
        side = ((side * batch.attention_mask.unsqueeze(-1)).sum(1) @ self.weight) * self.scale
        if self.step:
            side = (side / self.step).round() * self.step
        return ModelOutput(torch.stack((-side, side), 1))

    def perturbation_points(self) -> Mapping[str, Point]:
        return {"text": Point("embed", "output", lambda batch: batch.attention_mask)}


def batch(rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 50, (COUNT, TOKENS), generator=generator)
    mask = torch.ones(COUNT, TOKENS, dtype=torch.bool)
    mask[::3, -1] = False
    whole = Batch([str(i) for i in range(COUNT)], ids, mask)
    targets = Plane()(whole).logits.argmax(1)
    return Batch(whole.ids[rows], ids[rows], mask[rows], targets=targets[rows])


def margins(of: Batch) -> Tensor:
    return Plane()(of).logits.amax(1).detach()


def run(
    model: Model, of: Batch, case: Case, *, source: Model | None = None, norm: str = "l2", relative: str = "none"
) -> list[Outcome]:
    def passes(own: Model) -> ModelPasses:
        return ModelPasses(own, CrossEntropy(), Precision("fp32", CPU), 0)

    ours, guide = passes(model), None if source is None else passes(source)
    measure = Measure(CrossEntropy(), Accuracy(), case.loss)
    config = RobustnessConfig(norm=norm, relative_to=relative)  # type: ignore[arg-type]
    seeds = [int(id_) for id_ in of.ids]
    return attack(case, config, of, lambda: Victim(ours, of, measure, seeds, bool, guide))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_universal_perturbation_of_a_plane_is_known(norm: str) -> None:
    """Of examples on one side: along the plane's normal, each position as strongly as it has real tokens."""
    whole, model = batch(), Plane()
    assert whole.targets is not None
    assert whole.attention_mask is not None
    own = (whole.targets == 1).nonzero().flatten()
    of = Batch([whole.ids[i] for i in own], whole.input_ids[own], whole.attention_mask[own], targets=whole.targets[own])  # type: ignore[index]
    radius, weight = 0.4, model.weight.detach()
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)
    measure = Measure(CrossEntropy(), Accuracy(), "margin")
    first, second = (Batch(of.ids, of.input_ids, of.attention_mask, targets=of.targets), of)
    victims: list[Victim] = []

    def make() -> Victim:
        held_out = HeldOut(lambda: iter((first, second)))
        victims.append(Victim(passes, of, measure, [int(i) for i in of.ids], bool, None, held_out))
        return victims[-1]

    config = RobustnessConfig(norm=norm, relative_to="none")  # type: ignore[arg-type]
    found = attack(case_of("universal", radius, loss="margin"), config, of, make)
    (delta,) = victims[0].kept.values()
    tokens = of.attention_mask.sum(0, keepdim=True)  # type: ignore[union-attr] # by how many a position is pulled
    best = -weight.sign() * radius * tokens.T.sign()
    if norm == "l2":
        best = -weight * tokens.T
        best = radius * best / best.norm()
    for row, mask in zip(delta, of.attention_mask, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(row, best * mask.unsqueeze(-1), rtol=1e-4, atol=1e-6)
    moves = (best * of.attention_mask.unsqueeze(-1)).sum(1) @ weight  # type: ignore[union-attr]
    expected = [float(margin + move > 0) for margin, move in zip(margins(of), moves, strict=True)]
    assert [outcome.scores[0] for outcome in found] == expected
    assert 0 < sum(expected) < len(expected)


def case_of(attack: str, *radii: float, loss: str = "task", steps: int = 20, restarts: int = 0) -> Case:
    return Case("text", attack, loss, radii, steps, restarts)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["fgm", "pgd", "apgd"])
def test_exactly_the_examples_nearer_to_the_plane_than_the_radius_fall(name: str, norm: str) -> None:
    of, model = batch(), Plane()
    assert of.attention_mask is not None
    tokens = of.attention_mask.sum(1)
    slope = model.weight.detach().norm() * tokens.sqrt() if norm == "l2" else model.weight.detach().abs().sum() * tokens
    distances = margins(of) / slope
    radii = [float(r) for r in torch.quantile(distances, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))]
    found = run(model, of, case_of(name, *radii), norm=norm)
    for place, radius in enumerate(radii):
        expected = [float(distance > radius) for distance in distances]
        assert [outcome.scores[place] for outcome in found] == expected
    assert 0 < sum(outcome.scores[1] for outcome in found) < COUNT


def test_the_size_used_is_that_of_the_radius() -> None:
    of = batch()
    found = run(Plane(), of, case_of("fgm", 0.1), relative="embedding")
    fallen = [outcome for outcome in found if outcome.scores[0] == 0]
    assert fallen
    assert all(outcome.sizes[0] == pytest.approx(0.1) for outcome in fallen)


def test_noise_needs_a_far_larger_radius() -> None:
    of = batch()
    radius = float(margins(of).median()) / float(Plane().weight.detach().norm()) / math.sqrt(TOKENS)
    noise, pgd = (run(Plane(), of, case_of(name, radius)) for name in ("noise", "pgd"))
    assert sum(o.scores[0] for o in noise) > sum(o.scores[0] for o in pgd) + COUNT / 5
    assert noise[0].backwards == [0]


@pytest.mark.parametrize("name", ["noise", "pgd", "apgd"])
def test_results_do_not_depend_on_the_batch(name: str) -> None:
    case = case_of(name, 0.3, 0.6, steps=7, restarts=2)
    whole = run(Plane(), batch(), case)
    parts = [one for start in range(0, COUNT, 7) for one in run(Plane(), batch(slice(start, start + 7)), case)]
    assert [o.scores for o in whole] == [o.scores for o in parts]
    for one, other in zip(whole, parts, strict=True):
        if 0 not in one.scores:  # whoever has fallen goes on as long as the batch does
            torch.testing.assert_close(one.losses, other.losses, rtol=1e-9, atol=0)


def test_a_larger_radius_begins_where_the_smaller_one_ended() -> None:
    found = run(Plane(), batch(), case_of("pgd", 0.2, 0.4, 0.8, 1.6))
    assert all(earlier >= later for o in found for earlier, later in zip(o.scores, o.scores[1:], strict=False))


def test_random_starts_are_within_the_ball_and_those_of_the_example() -> None:
    of = batch()
    passes = ModelPasses(Plane(), CrossEntropy(), Precision("fp32", CPU), 0)
    victim = Victim(passes, of, Measure(CrossEntropy(), Accuracy()), list(range(COUNT)))
    from villa.analysis.attacks import Ball

    ball = Ball(("text",), 0.5, relative_to="none")
    drawn = ball.begin(victim, ball.settings(0.0, init="uniform"), 3)
    victim.run(drawn)
    delta = drawn["text"].delta
    assert delta is not None
    assert of.attention_mask is not None
    norms = delta.flatten(1).norm(dim=1)
    assert bool((norms > 0.1).all())
    assert bool((norms <= 0.5 + 1e-12).all())
    assert not delta[~of.attention_mask].any()


class Rounded(Plane):
    """Embeddings are rounded, and the gradient passes as if they were not."""

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        assert batch.attention_mask is not None
        there = self.embed(batch.input_ids)
        there = there + ((there / 0.25).round() * 0.25 - there).detach()
        side = (there * batch.attention_mask.unsqueeze(-1)).sum(1) @ self.weight
        return ModelOutput(torch.stack((-side, side), 1))


def test_the_gradient_is_that_of_finite_differences_unless_it_is_masked() -> None:
    of, case = batch(), case_of("finite_difference", 0.1)

    def wrong(model: Model) -> int:
        found = [outcome.slope_error for outcome in run(model, of, case)]
        return sum(error is not None and error > 0.1 for error in found)

    assert wrong(Plane()) == wrong(Plane().float()) == 0
    masked = (Plane(scale=1e4), Plane(scale=1e4).float(), Plane(step=0.5), Rounded())
    assert all(wrong(model) > COUNT * 0.9 for model in masked)


def test_the_checks_call_out_masked_gradients_alone() -> None:
    of = batch()

    def failed(model: Model) -> set[str]:
        main = case_of("pgd", 0.3, 1.0)
        cases = [main, *(case for case in extra_cases(main) if case is not None)]
        outcomes = {case: run(model, of, case) for case in cases}
        passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)
        losses, _ = Victim(passes, of, Measure(CrossEntropy(), Accuracy()), list(range(COUNT))).clean()
        found = checks(main, outcomes, dict(zip(of.ids, losses.tolist(), strict=True)))
        assert "the loss moves as the gradient says" in {check.name for check in found}
        return {check.name for check in found if not check.passed}

    assert not failed(Plane())
    assert "the loss moves as the gradient says" in failed(Plane(scale=1e4))
    assert "the loss moves as the gradient says" in failed(Rounded())


@pytest.mark.parametrize("blinded", [{"scale": 1e4}, {"step": 0.5}])
def test_masked_gradients_are_seen(blinded: dict[str, float]) -> None:
    of = batch()
    found = run(Plane(**blinded), of, case_of("pgd", 0.5))
    assert sum(o.flat for o in found) > COUNT / 2
    assert not any(o.flat for o in run(Plane(), of, case_of("pgd", 0.5)))


def test_the_margin_sees_through_a_saturated_loss() -> None:
    of = batch()
    task, by_margin = (run(Plane(scale=1e4), of, case_of("pgd", 1.0, loss=loss)) for loss in ("task", "margin"))
    true = run(Plane(), of, case_of("pgd", 1.0))
    assert [o.scores for o in by_margin] == [o.scores for o in true]
    assert sum(o.scores[0] for o in task) > sum(o.scores[0] for o in true)


def test_gradients_of_another_model_can_be_followed() -> None:
    of, other = batch(), Plane()
    with torch.no_grad():
        other.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    own, transferred = (run(Plane(), of, case_of("pgd", 0.6), source=source) for source in (None, other))
    assert sum(o.scores[0] for o in transferred) > sum(o.scores[0] for o in own)
    assert [o.scores for o in run(Plane(), of, case_of("pgd", 0.6), source=Plane())] == [o.scores for o in own]


class Bowl(Plane):
    """A loss that is a concave quadratic of the embeddings, narrow in some directions."""

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        assert batch.input_ids is not None
        there = self.embed(batch.input_ids)
        curved = torch.logspace(-2, 1, WIDTH, dtype=torch.float64)
        value = -(curved * (there - 0.7) ** 2).sum((1, 2))
        return ModelOutput(torch.stack((torch.zeros_like(value), value), 1))


class Followed(Victim):
    """Keeps where the passes went."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.path: list[Tensor] = []

    def run(self, perturbations: Mapping[str, Perturbation], **options: bool) -> Tensor:
        losses = super().run(perturbations, **options)
        (delta,) = (p.delta for p in perturbations.values())
        assert delta is not None
        self.path.append(delta.detach().clone())
        return losses


def test_a_transferred_attack_goes_where_it_goes_on_the_source() -> None:
    of, other = batch(), Plane()
    with torch.no_grad():
        other.weight.copy_(other.weight.flip(0))
    case, paths = case_of("apgd", 0.6, steps=30), []
    for attacked, guide in ((Plane(), other), (other, None)):
        ours, theirs = (
            None if one is None else ModelPasses(one, CrossEntropy(), Precision("fp32", CPU), 0)
            for one in (attacked, guide)
        )
        measure = Measure(CrossEntropy(), Accuracy(), case.loss)
        victim = Followed(ours, of, measure, [int(id_) for id_ in of.ids], bool, theirs)
        attack(case, RobustnessConfig(relative_to="none"), of, lambda victim=victim: victim)  # type: ignore[misc]
        paths.append(torch.stack(victim.path))
    torch.testing.assert_close(*paths, rtol=0, atol=0)


def test_apgd_gets_as_far_in_a_hundred_steps_as_pgd_in_a_thousand() -> None:
    whole = batch(slice(0, 8))
    of = Batch(whole.ids, whole.input_ids, torch.ones(8, TOKENS, dtype=torch.bool), targets=torch.zeros(8).long())
    few, many = (run(Bowl(), of, case_of(n, 2.0, loss="margin", steps=s)) for n, s in (("apgd", 100), ("pgd", 1000)))
    reached, best = (torch.tensor([o.losses[0] for o in found]) for found in (few, many))
    assert bool((reached >= best - 0.01 * best.abs()).all())


def test_an_attack_leaves_the_model_as_it_was() -> None:
    model, of = tiny_model(), tiny_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.train()
    run_both = Case("both", "apgd", "task", (0.1,), 4, 1)
    measure = Measure(CrossEntropy(), Accuracy())
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)
    attack(run_both, RobustnessConfig(), of, lambda: Victim(passes, of, measure, list(range(6))))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())


def test_without_a_perturbation_the_loss_is_that_of_the_task() -> None:
    model, of = tiny_model(), tiny_batch()
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)
    losses, scores = Victim(passes, of, Measure(CrossEntropy(), Accuracy()), list(range(6))).clean()
    output = passes.forward(of, grad=False, train=False)
    torch.testing.assert_close(losses.mean(), CrossEntropy()(output, of))
    assert of.targets is not None
    assert scores.tolist() == (output.logits.argmax(1) == of.targets).double().tolist()


def test_the_margin_of_soft_targets_takes_all_right_answers() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.0, 0.0]])
    one = margin(ModelOutput(logits), Batch(["a"], targets=torch.tensor([[0.0, 1.0, 1.0, 0.3]])))
    assert one.item() == 1.0 - 4.0
    nothing = margin(ModelOutput(logits), Batch(["a"], targets=torch.zeros(1, 4)))
    assert nothing.item() == 0.0


def test_the_interval_is_that_of_a_mean() -> None:
    low, high = interval([1.0] * 80 + [0.0] * 20)
    assert low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.015)
    assert high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.015)
    assert interval([1.0, 1.0]) == (1.0, 1.0)
