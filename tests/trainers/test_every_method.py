"""FGM, PGD, SMART with its presets, R-Drop and noise against loops without hooks, in double precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processor_batches import make_batch, tiny_folder, write_questions
from replaced_modules import score as replaced
from replaced_modules import shapes
from test_every_head import CASES, WIDTHS, padded_batch
from test_every_head import build as build_head
from test_every_head import score as score_head
from test_two_heads import build as build_two
from test_two_heads import padded_batch as two_batch
from test_two_heads import score as score_two
from tiny import RecordingPasses, gradients, tiny_batch, tiny_model
from torch import Tensor

from villa.batch import Batch
from villa.config.values import DEFAULT
from villa.config.variants import Layer, Variant, preset
from villa.facts import DataFacts
from villa.losses.base import Loss
from villa.losses.classification import BinaryCrossEntropy, CrossEntropy
from villa.models.base import Model, ModelOutput
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel
from villa.trainers.adversarial import VIEWS
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.noise import NoiseConfig, NoiseTrainer
from villa.trainers.pgd import FgmConfig, FgmTrainer, PgdConfig, PgdTrainer
from villa.trainers.rdrop import RDropConfig, RDropTrainer
from villa.trainers.smart import SmartConfig, SmartTrainer
from villa.trainers.standard import StandardTrainer

Deltas = dict[str, Tensor]


@dataclass
class Subject:
    """A model with a batch, and its logits with perturbations written out."""

    model: Model
    batch: Batch
    loss: Loss
    score: Callable[..., Tensor]
    masks: Deltas
    widths: dict[str, int]
    close: dict[str, float]

    def logits(self, deltas: Deltas) -> Tensor:
        zeros = {m: torch.zeros(*mask.shape, self.widths[m], dtype=torch.float64) for m, mask in self.masks.items()}
        return self.score(self.model, self.batch, **{**zeros, **deltas})

    def task(self, logits: Tensor) -> Tensor:
        value: Tensor = self.loss(ModelOutput(logits), self.batch)
        return value


def of_head(head: str) -> Subject:
    model, batch = build_head(head), padded_batch(head)
    return _subject(model, batch, CASES[head][2], score_head, WIDTHS, {"rtol": 1e-9, "atol": 1e-12})


def of_two(name: str) -> Subject:
    model, batch = build_two(name, "answers"), two_batch(name, "answers")
    widths = {"text": 16, "image": 16 if name == "vilt" else 6}
    return _subject(model, batch, BinaryCrossEntropy(), score_two, widths, {"rtol": 1e-8, "atol": 1e-11})


def of_transformers(name: str, task: Any, folder: Path) -> Subject:
    torch.manual_seed(0)
    path = tiny_folder(name, folder)
    batch = make_batch(path, task, write_questions(folder))
    if task == "contrastive":  # the loss of the loop compares classes
        batch = replace(batch, targets=torch.arange(len(batch)))
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=str(path)), DataFacts(task=task))
    model.load_weights(str(path))
    batch = batch.map(lambda value: value.double() if value.is_floating_point() else value)
    masks, widths = shapes(model.double(), batch, CrossEntropy())
    # Language models normalise and rotate in fp32 whatever the type of their weights.
    return Subject(model, batch, CrossEntropy(), replaced, masks, widths, {"rtol": 1e-5, "atol": 1e-7})


def _subject(model: Model, batch: Batch, loss: Loss, score: Any, widths: dict[str, int], close: Any) -> Subject:
    masks = {m: point.mask(batch) for m, point in model.perturbation_points().items()}
    return Subject(model, batch, loss, score, masks, widths, close)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(params=["classification", "nlvr2_paired_attn", "regions", "visual_bert", "vilt", "llava", "clip"])
def subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    name = request.param
    if name in CASES:
        return of_head(name)
    if name in ("visual_bert", "vilt"):
        return of_two(name)
    return of_transformers(name, "generation" if name == "llava" else "contrastive", folder)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of softmax distributions, the mean over rows."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def divergence(perturbed: Tensor, clean: Tensor, direction: str) -> Tensor:
    forward, reverse = kl(clean, perturbed), kl(perturbed, clean)
    return {"forward": forward, "reverse": reverse, "symmetric": forward + reverse}[direction]


def moved(subject: Subject, config: Any, deltas: Deltas, slopes: Deltas) -> Deltas:
    """A step, then back onto the ball or sphere, norms being those of rows or tokens."""

    def norm(values: Tensor) -> Tensor:
        flat = values if config.scope == "token" else values.flatten(1)
        size = flat.norm(dim=-1) if config.norm == "l2" else flat.abs().amax(-1)
        return size.unsqueeze(-1) if config.scope == "token" else size[:, None, None]

    made = {}
    for m, slope in slopes.items():
        masked = config.mask_padding or subject.model.perturbation_points()[m].confined
        g = slope * subject.masks[m][..., None] if masked else slope
        radius, size = getattr(config, f"{m}_radius"), getattr(config, f"{m}_step_size")
        direction = {"sign": g.sign(), "raw": g}.get(config.step, g / norm(g).clamp(min=1e-8))
        delta = size * direction if config.step == "power" else deltas[m] + size * direction
        if radius and config.projection == "sphere":
            delta = delta * radius / norm(delta).clamp(min=1e-8)
        elif radius and config.norm == "l2":
            delta = torch.where(norm(delta) > radius, delta * radius / norm(delta), delta)
        made[m] = delta.clamp(-radius, radius) if radius and config.norm == "linf" else delta
    return made


def searched(subject: Subject, config: Any, deltas: Deltas, objective: Callable[[Tensor], Tensor]) -> Deltas:
    """Perturbations after ``config.steps`` ascents of an objective of the logits, each view by itself."""
    for _ in range(config.steps):
        found: Deltas = {}
        for view in VIEWS[config.modality]:
            leaves = {m: deltas[m].detach().clone().requires_grad_() for m in view}
            slopes = torch.autograd.grad(objective(subject.logits(leaves)), list(leaves.values()))
            found |= moved(subject, config, deltas, dict(zip(view, slopes, strict=True)))
        deltas = found
    return {m: delta.detach() for m, delta in deltas.items()}


def assert_equal(subject: Subject, total: Tensor) -> None:
    """The gradients that a step has left are those of ``total``, and something is not zero."""
    named = dict(subject.model.named_parameters())
    wanted = dict(zip(named, torch.autograd.grad(total, [*named.values()], allow_unused=True), strict=True))
    mine = gradients(subject.model)
    assert sum(gradient.abs().sum() > 0 for gradient in mine.values()) > 5
    for name, parameter in named.items():
        zeros = torch.zeros_like(parameter)
        ours, theirs = mine.get(name, zeros), zeros if wanted[name] is None else wanted[name]
        torch.testing.assert_close(ours, theirs, **subject.close, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[arg-type]


def ran(subject: Subject, trainer: Any) -> tuple[RecordingPasses, dict[str, Tensor]]:
    """Take a step in evaluation mode: the loops know no dropout."""
    subject.model.eval()
    passes = RecordingPasses(subject.model, subject.loss)
    logs = trainer.step(subject.batch, passes)
    assert passes.backwards[-1]
    assert not any(passes.backwards[:-1])
    return passes, logs


SEARCHED: dict[str, Any] = {
    "fgm": FgmConfig(text_step_size=0.3, image_step_size=0.4, weight=0.7),
    "fgm_alternating": FgmConfig(text_step_size=0.3, image_step_size=0.4, modality="alternating", steps=2),
    "pgd": PgdConfig(text_step_size=0.3, image_step_size=0.4, init="zero", text_radius=0.5, image_radius=0.5),
    "pgd_linf": PgdConfig(
        text_step_size=0.02, image_step_size=0.03, norm="linf", modality="alternating", clean_loss=True
    ),
    "pgd_at_once": PgdConfig(steps=0, text_step_size=0.3, image_step_size=0.4, ascent_mode="eval"),
}


@pytest.mark.parametrize("name", SEARCHED)
def test_fgm_and_pgd_equal_the_loop(subject: Subject, name: str) -> None:
    config = SEARCHED[name]
    trainer = (FgmTrainer if name.startswith("fgm") else PgdTrainer)(config)
    passes, logs = ran(subject, trainer)
    zeros = {m: torch.zeros(*subject.masks[m].shape, subject.widths[m], dtype=torch.float64) for m in subject.masks}
    start = zeros
    if config.init != "zero":  # the draws are those of the first pass that uses each perturbation
        start = {m: next(used[m] for used in passes.used if m in used) for m in zeros}
    deltas = searched(subject, config, start, subject.task)
    views = VIEWS[config.modality]
    losses = [subject.task(subject.logits({m: deltas[m] for m in view})) for view in views]
    total = config.weight * torch.stack(losses).mean()
    if config.clean_loss:
        total = total + subject.task(subject.logits({}))
    assert_equal(subject, total)
    torch.testing.assert_close(logs["loss"], total.detach(), **subject.close)  # type: ignore[arg-type]
    for view, used in zip(views, passes.used[-len(views) :], strict=True):
        for m in view:
            torch.testing.assert_close(used[m], deltas[m], **subject.close)  # type: ignore[arg-type]


def smart(name: str, **options: Any) -> SmartConfig:
    """The options that a preset leads to."""
    values = {"trainer.preset": type("V", (), {"data": name, "origin": DEFAULT})()}
    found: Layer = preset("trainer", Variant("smart", DEFAULT, SmartConfig, 0), values)  # type: ignore[arg-type]
    return SmartConfig(**{**{key.partition(".")[2]: value.data for key, value in found.items()}, **options})


STEPS: dict[str, Any] = {"text_step_size": 0.3, "image_step_size": 0.4, "text_radius": 0.5, "image_radius": 0.5}


@pytest.mark.parametrize("modality", ["both", "alternating"])
@pytest.mark.parametrize("name", ["smart", "vat", "alum", "mtdnn", "trades"])
def test_smart_and_its_presets_equal_the_loop(subject: Subject, name: str, modality: Any) -> None:
    config = smart(name, **STEPS, init_scale=0.1, modality=modality, weight=1.5)
    if name == "trades":
        assert config.steps == 10
        config = replace(config, steps=3)
    passes, logs = ran(subject, SmartTrainer(config))
    start = {m: next(used[m] for used in passes.used if m in used) for m in subject.masks}
    assert all((delta[subject.masks[m]] != 0).any() for m, delta in start.items())
    fixed = subject.logits({}).detach()
    ascended = {"smart": "symmetric", "mtdnn": "reverse"}.get(name, "forward")
    deltas = searched(subject, config, start, lambda logits: divergence(logits, fixed, ascended))
    clean, terms = subject.logits({}), []
    for view in VIEWS[modality]:
        logits = subject.logits({m: deltas[m] for m in view})
        terms.append(
            {
                "smart": lambda p: divergence(p, clean, "symmetric"),
                "vat": lambda p: divergence(p, clean.detach(), "forward"),
                "alum": lambda p: kl(clean.detach(), p) + kl(p.detach(), clean),
                "mtdnn": lambda p: kl(clean.detach(), p) + kl(p.detach(), clean),
                "trades": lambda p: divergence(p, clean, "forward"),
            }[name](logits)
        )
    assert logs[f"pass{config.steps}/divergence"] > 1e-6
    assert_equal(subject, subject.task(clean) + 1.5 * torch.stack(terms).mean())


@contextmanager
def elsewhere(model: Model) -> Iterator[None]:
    """The model with other weights."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    yield
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)


def test_the_proximal_term_equals_the_loop(subject: Subject) -> None:
    subject.model.eval()
    with elsewhere(subject.model):
        anchor = subject.logits({}).detach()
    passes = RecordingPasses(subject.model, subject.loss)
    passes.begin(1, 0, 1.0, reference=lambda: elsewhere(subject.model))
    config = SmartConfig(steps=0, init_scale=0.0, proximal_weight=2.0)
    logs = SmartTrainer(config).step(subject.batch, passes)
    clean = subject.logits({})
    proximal = divergence(clean, anchor, "symmetric")
    torch.testing.assert_close(logs["proximal"], proximal.detach(), **subject.close)  # type: ignore[arg-type]
    assert proximal > 1e-6
    assert_equal(subject, subject.task(clean) + 2.0 * proximal)


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_noise_equals_the_loop(subject: Subject, weight: float) -> None:
    config = NoiseConfig(modality="both", text_noise=2.0, image_noise=3.0, consistency_weight=weight)
    passes, _ = ran(subject, NoiseTrainer(config))
    noise = passes.used[-1]
    for m, mask in subject.masks.items():
        assert (noise[m][~mask] == 0).all()
        bound = {"text": 2.0, "image": 3.0}[m] / (mask.sum(1) * subject.widths[m]).sqrt()
        assert (noise[m].flatten(1).abs().amax(1) <= bound).all()
    noisy, clean = subject.logits(noise), subject.logits({})
    r3f = subject.task(clean) + weight * divergence(noisy, clean, "symmetric")
    assert_equal(subject, r3f if weight else subject.task(noisy))


def test_rdrop_without_dropout_is_standard_training(subject: Subject) -> None:
    _, logs = ran(subject, RDropTrainer(RDropConfig(weight=3.0)))
    assert logs["divergence"].abs() < 1e-12
    assert_equal(subject, subject.task(subject.logits({})))


@pytest.mark.parametrize(
    "trainer",
    [
        FgmTrainer(FgmConfig()),
        FgmTrainer(FgmConfig(modality="alternating", steps=3)),
        PgdTrainer(PgdConfig(steps=2)),
        PgdTrainer(PgdConfig(modality="alternating", clean_loss=True)),
        PgdTrainer(PgdConfig(steps=0)),
        SmartTrainer(SmartConfig(steps=2)),
        SmartTrainer(SmartConfig(modality="alternating")),
        NoiseTrainer(NoiseConfig()),
        NoiseTrainer(NoiseConfig(consistency_weight=1.0)),
        RDropTrainer(RDropConfig()),
    ],
)
def test_cost_counts_the_passes(trainer: Any) -> None:
    model, counts = tiny_model(), {"forward": 0, "backward": 0}
    model.head.register_forward_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
    model.head.register_full_backward_hook(lambda *_: counts.update(backward=counts["backward"] + 1))
    passes = RecordingPasses(model)
    gradient, asked = passes.gradient, []
    passes.gradient = lambda *given, **named: (asked.append(given), gradient(*given, **named))[1]  # type: ignore[func-returns-value, method-assign]
    trainer.step(tiny_batch(), passes)
    forwards, backwards, *ascents = trainer.cost()
    assert (counts["forward"], counts["backward"]) == (forwards, backwards + sum(ascents))
    assert len(asked) == sum(ascents)


def test_fgm_is_twice_freelb_of_two_steps_from_zero() -> None:
    results = []
    for trainer in (
        FgmTrainer(FgmConfig(text_step_size=0.3, image_step_size=0.4)),
        FreeLBTrainer(FreeLBConfig(steps=2, init="zero", text_step_size=0.3, image_step_size=0.4)),
    ):
        model = tiny_model()
        trainer.step(tiny_batch(), RecordingPasses(model))
        results.append(gradients(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, 2 * results[1][name], rtol=1e-12, atol=1e-14)


def test_the_divergence_of_smart_knows_no_labels_and_shrinks_with_the_square_of_the_radius() -> None:
    found = []
    for radius, targets in ((0.02, [0, 1, 0, 1, 0, 1]), (0.02, [1, 0, 1, 0, 1, 0]), (0.01, [0, 1, 0, 1, 0, 1])):
        size = {"text_step_size": radius, "image_step_size": radius, "text_radius": radius, "image_radius": radius}
        trainer = SmartTrainer(SmartConfig(**size, norm="l2", init_scale=radius / 100, projection="sphere"))
        batch = replace(tiny_batch(), targets=torch.tensor(targets))
        found.append(trainer.step(batch, RecordingPasses(tiny_model()))["pass1/divergence"].item())
    assert found[0] == found[1]
    assert found[0] / found[2] == pytest.approx(4, rel=0.05)


def test_without_noise_or_step_smart_is_standard_training() -> None:
    results = []
    config = SmartConfig(text_step_size=0.0, init_scale=0.0, modality="text")
    for method in (SmartTrainer(config), StandardTrainer()):
        model = tiny_model()
        method.step(tiny_batch(), RecordingPasses(model))
        results.append(gradients(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-12, atol=1e-14)
