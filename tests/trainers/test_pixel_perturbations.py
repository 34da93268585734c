"""Perturbations of pixels, and FARE and TeCoA, against loops without hooks in double precision."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processor_batches import make_batch, tiny_folder, write_questions
from test_two_heads import LOSSES, SIZES, padded_batch
from tiny import RecordingPasses, gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from villa.batch import Batch
from villa.errors import ConfigError
from villa.facts import DataFacts, PixelScale
from villa.losses.base import Loss
from villa.losses.classification import CrossEntropy
from villa.models.base import Model
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel
from villa.models.vilt import Vilt, ViltConfig
from villa.trainers.adversarial import SearchConfig
from villa.trainers.base import forward_equivalents
from villa.trainers.fare import FareConfig, FareTrainer, TecoaConfig, TecoaTrainer, images_of
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.noise import NoiseConfig, NoiseTrainer
from villa.trainers.pgd import PgdConfig, PgdTrainer
from villa.trainers.smart import SmartConfig, SmartTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

SCALE = PixelScale((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
PIXELS: dict[str, Any] = {"modality": "image", "points": {"image": "pixels"}}
CLOSE: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}
#: Labels' texts of the tiny tokenizer, of different lengths.
LABELS = ((1, 20, 21, 3), (1, 22, 23, 24, 3), (1, 25, 3))


@dataclass
class Subject:
    """A model that reads pixels, with a batch."""

    model: Model
    batch: Batch
    loss: Loss

    @property
    def pixels(self) -> Tensor:
        """``[images, 3, H, W]``."""
        assert self.batch.pixel_values is not None
        return self.batch.pixel_values.flatten(0, -4)

    @property
    def real(self) -> Tensor:
        """Where pixels are real, ``[images, 1, H, W]``."""
        mask = (self.batch.inputs or {}).get("pixel_mask")
        return torch.ones_like(self.pixels[:, :1]) if mask is None else mask.flatten(0, -3)[:, None].double()

    def output(self, colours: Tensor) -> Any:
        """The output on images whose colours are moved, ``[images, 3, H, W]``."""
        assert self.batch.pixel_values is not None
        moved = self.pixels + colours / channels(SCALE.std)
        return self.model(replace(self.batch, pixel_values=moved.reshape(self.batch.pixel_values.shape)))

    def task(self, colours: Tensor) -> Tensor:
        value: Tensor = self.loss(self.output(colours), self.batch)
        return value


def channels(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def coloured(batch: Batch) -> Batch:
    """A batch with random colours, many of them black or white."""
    assert batch.pixel_values is not None
    torch.manual_seed(2)
    colours = (torch.rand(batch.pixel_values.shape, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    pixels = (colours - channels(SCALE.mean)) / channels(SCALE.std)
    return replace(batch, pixel_values=pixels)


def of_vilt(head: Any = "answers") -> Subject:
    torch.manual_seed(0)
    config = ViltConfig(**SIZES, head=head, image_size=8, patch_size=4)
    model = Vilt.from_config(config, DataFacts(30, 2 if head == "nlvr2" else 5, pixels=SCALE)).double()
    return Subject(model, coloured(padded_batch("vilt", head)), LOSSES[head])


def of_transformers(name: str, folder: Path, *, labels: bool = False) -> Subject:
    torch.manual_seed(0)
    path = tiny_folder(name, folder)
    task: Any = "classification" if labels else "generation" if name == "llava" else "contrastive"
    batch = coloured(make_batch(path, task, write_questions(folder)))
    facts = DataFacts(task=task, num_labels=3 if labels else None, pixels=SCALE, label_texts=LABELS if labels else None)
    if task != "generation":  # the loss of the loop compares classes
        batch = replace(batch, targets=torch.arange(len(batch)), objective=None)
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=str(path)), facts).double()
    model.load_weights(str(path))
    return Subject(model.double().eval(), batch, CrossEntropy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(params=["vilt", "vilt_of_two_images", "clip", "llava"])
def subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    if request.param.startswith("vilt"):
        return of_vilt("answers" if request.param == "vilt" else "nlvr2")
    return of_transformers(request.param, folder)


def as_images(subject: Subject, rows: Tensor) -> Tensor:
    """A perturbation ``[images, H * W, 3]`` as ``[images, 3, H, W]``."""
    return rows.transpose(1, 2).reshape(subject.pixels.shape)


def norms(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)[:, None, None, None]


def attacked(subject: Subject, config: SearchConfig, start: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """The perturbation after ``config.steps`` ascents, each projected to its ball, then to the colours that exist."""
    colours = subject.pixels * channels(SCALE.std) + channels(SCALE.mean)
    size, eps = config.image_step_size, config.image_radius
    assert eps is not None
    factors = channels(config.channels or (1.0, 1.0, 1.0))
    delta, velocity = start, torch.zeros_like(start)
    for _ in range(config.steps):
        leaf = delta.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(leaf), leaf)
        slope = slope * subject.real
        if config.norm == "linf":
            velocity = (config.momentum * velocity + slope.sign()).sign()
            delta = (delta + size * factors * velocity).clamp(min=-eps * factors, max=eps * factors)
        else:
            delta = delta + size * slope / norms(slope)
            delta = torch.where(norms(delta) > eps, delta * eps / norms(delta), delta)
        delta = (colours + delta).clamp(0, 1) - colours
    return delta.detach()


def assert_same_gradients(subject: Subject, total: Tensor) -> None:
    named = dict(subject.model.named_parameters())
    wanted = dict(zip(named, torch.autograd.grad(total, [*named.values()], allow_unused=True), strict=True))
    mine = gradients(subject.model)
    assert sum(gradient.abs().sum() > 0 for gradient in mine.values()) > 5
    for name, parameter in named.items():
        zeros = torch.zeros_like(parameter)
        theirs = zeros if wanted[name] is None else wanted[name]
        torch.testing.assert_close(mine.get(name, zeros), theirs, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[arg-type]


def assert_possible(subject: Subject, delta: Tensor, config: Any) -> None:
    """The perturbation is in its ball and among the colours that exist, to the bit, and padding has not moved."""
    colours = subject.pixels * channels(SCALE.std) + channels(SCALE.mean)
    assert (colours + delta >= -1e-15).all()
    assert (colours + delta <= 1 + 1e-15).all()
    assert (delta * (1 - subject.real) == 0).all()
    largest = delta.abs().amax() if config.norm == "linf" else norms(delta).amax()
    assert 0.5 * config.image_radius < largest <= config.image_radius * (1 + 1e-12)


ATTACKS: dict[str, PgdConfig] = {
    "linf": PgdConfig(**PIXELS, norm="linf", step="sign", image_step_size=0.02, image_radius=0.05),
    "momentum": PgdConfig(**PIXELS, norm="linf", step="sign", image_step_size=0.02, image_radius=0.05, momentum=0.9),
    "channels": PgdConfig(
        **PIXELS, norm="linf", step="sign", image_step_size=0.02, image_radius=0.05, channels=[1.0, 0.5, 0.0]
    ),
    "l2": PgdConfig(**PIXELS, norm="l2", image_step_size=0.7, image_radius=1.5),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_pgd_on_pixels_equals_the_loop(subject: Subject, name: str) -> None:
    config = ATTACKS[name]
    trainer = PgdTrainer(config)
    trainer.check(subject.model)
    passes = RecordingPasses(subject.model, subject.loss)
    logs = trainer.step(subject.batch, passes)
    start = as_images(subject, passes.used[0]["image.pixels"])
    delta = attacked(subject, config, start, subject.task)
    torch.testing.assert_close(as_images(subject, passes.used[-1]["image.pixels"]), delta, **CLOSE)  # type: ignore[arg-type]
    assert_possible(subject, delta, config)
    assert_same_gradients(subject, subject.task(delta))
    assert 0 < logs["pass3/image.pixels_delta"] < 1


@pytest.mark.parametrize(
    "trainer",
    [
        FreeLBTrainer(FreeLBConfig(**PIXELS, image_step_size=0.5, image_radius=1.0)),
        VillaTrainer(VillaConfig(**PIXELS, image_step_size=0.5, image_radius=1.0)),
        VillaTrainer(
            VillaConfig(modality="alternating", points={"image": ["embeddings", "pixels"]}, image_step_size=0.5)
        ),
        SmartTrainer(SmartConfig(**PIXELS, steps=2, image_step_size=0.02, image_radius=0.05, init_scale=0.01)),
        NoiseTrainer(NoiseConfig(**PIXELS, image_noise=3.0, consistency_weight=1.0)),
    ],
    ids=lambda trainer: type(trainer).__name__,
)
def test_every_method_perturbs_pixels(subject: Subject, trainer: Any) -> None:
    trainer.check(subject.model)
    passes = RecordingPasses(subject.model, subject.loss)
    trainer.step(subject.batch, passes)
    colours = subject.pixels * channels(SCALE.std) + channels(SCALE.mean)
    moved = [as_images(subject, used["image.pixels"]) for used in passes.used if "image.pixels" in used]
    assert moved[-1].abs().max() > 1e-3
    for delta in moved:
        assert (colours + delta).min() >= -1e-15
        assert (colours + delta).max() <= 1 + 1e-15
        assert (delta * (1 - subject.real) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_reads_colours_that_exist_to_the_bit(dtype: torch.dtype) -> None:
    """Black and white are what the scale makes of 0 and 1, in the type of the model, however far the step goes."""
    subject = of_vilt()
    model, batch = subject.model.to(dtype), subject.batch.map(lambda v: v.to(dtype) if v.is_floating_point() else v)
    mean, std = (channels(values).to(dtype) for values in (SCALE.mean, SCALE.std))
    assert batch.pixel_values is not None
    # As processors compute it, from colours of 8 bits.
    levels = torch.randint(0, 256, batch.pixel_values.shape).to(dtype)
    levels[:, :, :2], levels[:, :, 2:4] = 0, 255
    batch = replace(batch, pixel_values=(levels / 255 - mean) / std)
    seen: list[Tensor] = []
    model.get_submodule("vilt.embeddings.patch_embeddings.projection").register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach().clone())
    )
    config = PgdConfig(**PIXELS, norm="linf", step="sign", image_step_size=0.5, image_radius=0.9)
    PgdTrainer(config).step(batch, RecordingPasses(model, subject.loss))
    lowest, highest = -mean / std, (1 - mean) / std
    for values in seen:
        assert (values >= lowest).all()
        assert (values <= highest).all()
    for bound in (lowest, highest):
        assert (seen[-1] == bound).any()


def test_a_colour_at_its_bound_comes_back() -> None:
    """The gradient is that of the sum also where the colour cannot move further."""
    subject = of_vilt()
    passes = RecordingPasses(subject.model, subject.loss)
    config = FreeLBConfig(**PIXELS, steps=2, norm="linf", step="sign", image_step_size=1.0, init="zero")
    FreeLBTrainer(config).step(subject.batch, passes)
    first, second = (used["image.pixels"] for used in passes.used)
    black = as_images(subject, second) + subject.pixels * channels(SCALE.std) + channels(SCALE.mean)
    assert first.abs().max() == 0
    assert ((black < 1e-12) | (black > 1 - 1e-12))[subject.real.expand_as(black) > 0].double().mean() > 0.9


@contextmanager
def holding(model: Model, state: dict[str, Tensor]) -> Iterator[None]:
    """Give a model other weights within the context."""
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    yield
    model.load_state_dict(own)


def test_fare_equals_the_loop(folder: Path) -> None:
    subject = of_transformers("clip", folder)
    config = FareConfig(steps=3, image_step_size=0.02, image_radius=0.05)
    trainer = FareTrainer(config)
    trainer.check(subject.model)
    with torch.no_grad():
        target = embedded(subject, torch.zeros_like(subject.pixels))
    start = copy.deepcopy(subject.model.state_dict())
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    passes = RecordingPasses(subject.model, subject.loss)
    passes.begin(1, 0, 1.0, reference=lambda: holding(subject.model, start))
    logs = trainer.step(subject.batch, passes)

    def distance(colours: Tensor) -> Tensor:
        return (embedded(subject, colours) - target).square().sum(1).mean()

    delta = attacked(subject, config, as_images(subject, passes.used[1]["image.pixels"]), distance)
    torch.testing.assert_close(as_images(subject, passes.used[-1]["image.pixels"]), delta, **CLOSE)  # type: ignore[arg-type]
    assert_possible(subject, delta, config)
    assert_same_gradients(subject, distance(delta))
    torch.testing.assert_close(logs["loss"], distance(delta).detach(), **CLOSE)  # type: ignore[arg-type]
    assert not any(name.startswith("transformer.text_model") for name in gradients(subject.model))


def test_fare_on_clean_images_reads_no_texts_either(folder: Path) -> None:
    """As in an update whose ascents were not finite."""
    subject = of_transformers("clip", folder)
    start = copy.deepcopy(subject.model.state_dict())
    with torch.no_grad():
        target = embedded(subject, torch.zeros_like(subject.pixels))
        for parameter in subject.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer, passes = FareTrainer(FareConfig(objectives=["itm"])), RecordingPasses(subject.model, subject.loss)
    passes.begin(1, 0, 1.0, reference=lambda: holding(subject.model, start))
    trainer.step(replace(subject.batch, objective="contrastive"), passes)
    assert len(passes.used) == trainer.cost_of("contrastive")[0]
    assert_same_gradients(subject, (embedded(subject, torch.zeros(())) - target).square().sum(1).mean())


def embedded(subject: Subject, colours: Tensor) -> Tensor:
    """Embeddings of images, not scaled, from transformers' own method."""
    moved = subject.pixels + colours / channels(SCALE.std)
    features: Tensor = subject.model.transformer.get_image_features(pixel_values=moved).pooler_output  # type: ignore[operator,union-attr]
    return features


def test_fare_at_the_start_without_perturbation_is_zero(folder: Path) -> None:
    subject = of_transformers("clip", folder)
    trainer = FareTrainer(FareConfig(steps=0, init="zero"))
    logs = trainer.step(subject.batch, RecordingPasses(subject.model, subject.loss))
    assert logs["loss"] == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(subject.model).values())


def test_tecoa_equals_the_loop(folder: Path) -> None:
    subject = of_transformers("clip", folder, labels=True)
    config = TecoaConfig(steps=3, image_step_size=0.02, image_radius=0.05)
    trainer = TecoaTrainer(config)
    trainer.check(subject.model)
    passes = RecordingPasses(subject.model, subject.loss)
    trainer.step(subject.batch, passes)
    inner: Any = subject.model.transformer
    texts = [inner.get_text_features(input_ids=torch.tensor([text])).pooler_output[0] for text in LABELS]
    unit: Any = subject.model.label_embeddings  # in single precision, as the weights were loaded
    torch.testing.assert_close(unit, torch.nn.functional.normalize(torch.stack(texts), dim=-1), rtol=0, atol=1e-6)
    scale = inner.logit_scale.detach().exp()

    def loss(colours: Tensor) -> Tensor:
        seen = torch.nn.functional.normalize(embedded(subject, colours), dim=-1)
        return torch.nn.functional.cross_entropy(scale * seen @ unit.T, torch.arange(3))

    delta = attacked(subject, config, as_images(subject, passes.used[0]["image.pixels"]), loss)
    torch.testing.assert_close(as_images(subject, passes.used[-1]["image.pixels"]), delta, **CLOSE)  # type: ignore[arg-type]
    assert_same_gradients(subject, loss(delta))


@pytest.mark.parametrize(
    ("name", "trainer", "cost"),
    [
        ("clip", FareTrainer(FareConfig(steps=4)), (6, 1, 4)),
        ("siglip", FareTrainer(FareConfig(steps=4)), (6, 1, 4)),
        ("clip", TecoaTrainer(TecoaConfig(steps=4)), (5, 1, 4)),
        ("clip", TecoaTrainer(TecoaConfig(steps=4, clean_loss=True)), (6, 2, 4)),
    ],
)
def test_costs_are_those_of_their_operations(name: str, trainer: Any, cost: tuple[int, ...], folder: Path) -> None:
    subject = of_transformers(name, folder, labels=isinstance(trainer, TecoaTrainer))
    model = subject.model.float().train()
    batch = subject.batch.map(lambda value: value.float() if value.is_floating_point() else value)

    def flops(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    with torch.no_grad():
        once = flops(lambda: model(images_of(batch)))
    ours = flops(lambda: trainer.step(batch, RecordingPasses(model, subject.loss)))
    assert trainer.cost() == cost
    assert ours / once == pytest.approx(forward_equivalents(trainer.cost()), rel=0.05)


def test_refusals_say_what_would_do(folder: Path) -> None:
    vilt = of_vilt().model
    with pytest.raises(
        ConfigError, match=r"compares embeddings of images, but Vilt has none.*dual encoder.*trainer=smart"
    ):
        FareTrainer().check(vilt)
    with pytest.raises(ConfigError, match=r"texts of classes.*dataset\.label_prompt='a photo of a \{label\}'"):
        TecoaTrainer().check(of_transformers("clip", folder).model)
    torch.manual_seed(0)
    blind = Vilt.from_config(ViltConfig(**SIZES, image_size=8, patch_size=4), DataFacts(30, 5))
    with pytest.raises(ConfigError, match=r"'pixels' is no point of Vilt; it has embeddings, layer\.0; pixels need"):
        PgdTrainer(PgdConfig(**PIXELS)).check(blind)
