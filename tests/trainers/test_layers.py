"""Perturbations of the inputs of layers against a loop without hooks, in double precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processor_batches import make_batch, tiny_folder, write_questions
from test_every_head import CASES
from test_every_head import build as build_head
from test_every_head import padded_batch as head_batch
from test_two_heads import build as build_two
from test_two_heads import padded_batch as two_batch
from tiny import RecordingPasses, gradients
from torch import Tensor, nn

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.losses.base import Loss
from villa.losses.classification import BinaryCrossEntropy, CrossEntropy
from villa.models.base import Model
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel
from villa.models.lxmert import Lxmert, LxmertConfig
from villa.models.text_classifier import TextClassifier, TextClassifierConfig
from villa.trainers.pgd import PgdConfig, PgdTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

POINTS: dict[str, Any] = {"text": ["embeddings", "layer.0"], "image": "layer.0"}
SIZES: dict[str, Any] = {"text_step_size": 0.3, "image_step_size": 0.4}
#: Models whose layers read text and image together, and those with a stream for each.
TOGETHER, APART = ("classification", "nlvr2_paired", "regions", "visual_bert", "vilt", "llava"), ("lxmert", "clip")


def lxmert() -> Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "max_positions": 10, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    layers = {"language_layers": 1, "vision_layers": 1, "cross_layers": 2}
    config = LxmertConfig(**sizes, **layers, initializer_range=0.3)  # type: ignore[arg-type]
    return Lxmert.from_config(config, DataFacts(30, 5, 6)).double()


def subject(name: str, folder: Path) -> tuple[Model, Batch, Loss]:
    """A model with a padded batch and its loss."""
    if name in CASES:
        return build_head(name), head_batch(name), CASES[name][2]
    if name == "lxmert":
        return lxmert(), two_batch("visual_bert", "answers"), BinaryCrossEntropy()
    if name in ("visual_bert", "vilt"):
        return build_two(name, "answers"), two_batch(name, "answers"), BinaryCrossEntropy()
    torch.manual_seed(0)
    path = tiny_folder(name, folder)
    task: Any = "generation" if name == "llava" else "contrastive"
    batch = make_batch(path, task, write_questions(folder))
    if task == "contrastive":
        batch = replace(batch, targets=torch.arange(len(batch)))
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=str(path)), DataFacts(task=task))
    model.load_weights(str(path))
    batch = batch.map(lambda value: value.double() if value.is_floating_point() else value)
    return model.double(), batch, CrossEntropy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


class Shifted(nn.Module):
    """A layer with something added to one of its arguments: in the rows of its input, or where rows have no padding."""

    def __init__(self, inner: nn.Module, shift: Tensor, place: int, blocks: Any) -> None:
        super().__init__()
        self.inner, self.shift, self.place, self.blocks = inner, shift, place, blocks
        self.register_forward_pre_hook(lambda *_: None)  # whoever may change what a last layer reads gets all of it

    def forward(self, *given: Any, **named: Any) -> Any:
        values = list(given)
        rows = self.shift if values[self.place].dim() == 3 else self.shift.flatten(0, 1)[self.blocks]
        values[self.place] = values[self.place] + rows
        return self.inner(*values, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Looked(nn.Module):
    """A word embedding with something added to its output."""

    def __init__(self, inner: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.inner, self.shift = inner, shift

    def forward(self, ids: Tensor) -> Tensor:
        shifted: Tensor = self.inner(ids) + self.shift
        return shifted


def real_places(model: Model, batch: Batch, key: str) -> Tensor:
    """Indices of the real positions among the rows' positions, one row after the other: what a layer computes."""
    text, image = (model.other_points()[f"{m}.layer.0"].mask(batch) for m in ("text", "image"))
    assert text is not None
    assert image is not None
    if text.shape == image.shape and not (text & image).any():
        return (text | image).flatten().nonzero().squeeze(1)
    return (text if key.startswith("text") else image).flatten().nonzero().squeeze(1)


@contextmanager
def shifted(model: Model, batch: Batch, deltas: dict[str, Tensor]) -> Iterator[None]:
    """Other modules in place of those that are perturbed."""
    points, before = {**model.perturbation_points(), **model.other_points()}, []
    for key, delta in deltas.items():
        point = points[key]
        parent, _, child = point.module.rpartition(".")
        owner, inner = model.get_submodule(parent), model.get_submodule(point.module)
        before.append((owner, child, inner))
        if isinstance(inner, nn.Embedding):
            setattr(owner, child, Looked(inner, delta))
        else:
            places = real_places(model, batch, key) if point.blocks is not None else None
            owner._modules[child] = Shifted(inner, delta, point.argument or 0, places)
    try:
        yield
    finally:
        for owner, child, inner in reversed(before):
            owner._modules[child] = inner


def without_padding(model: Model) -> Model:
    """Let the model leave padding out, where it can."""
    for module in model.modules():
        if hasattr(module, "padding_free"):
            module.padding_free = "on"
    return model


@pytest.mark.parametrize("name", [*TOGETHER, *APART])
def test_pgd_in_layers_equals_the_loop(name: str, folder: Path) -> None:
    model, batch, loss = subject(name, folder)
    without_padding(model).eval()
    config = PgdConfig(steps=2, **SIZES, points=POINTS, text_radius=0.5, image_radius=0.5)
    trainer = PgdTrainer(config)
    trainer.check(model)
    passes = RecordingPasses(model, loss)
    logs = trainer.step(batch, passes)
    points = {**model.perturbation_points(), **model.other_points()}
    masks = {key: point.mask(batch) for key, point in points.items() if key in {*trainer.keys()}}
    assert len(masks) == 3
    deltas = passes.used[0]

    def task(moved: dict[str, Tensor]) -> Tensor:
        with shifted(model, batch, moved):
            value: Tensor = loss(model(batch), batch)
        return value

    for _ in range(2):
        leaves = {key: delta.clone().requires_grad_() for key, delta in deltas.items()}
        slopes = torch.autograd.grad(task(leaves), [*leaves.values()])
        deltas = {}
        for (key, leaf), slope in zip(leaves.items(), slopes, strict=True):
            mask = masks[key]
            g = slope if mask is None else slope * mask[..., None]
            size = config.text_step_size if key.startswith("text") else config.image_step_size
            delta = leaf.detach() + size * g / g.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None]
            norm = delta.flatten(1).norm(dim=1)[:, None, None]
            deltas[key] = torch.where(norm > 0.5, delta * 0.5 / norm, delta)
    close = {"rtol": 1e-10, "atol": 1e-12}
    for key, delta in deltas.items():
        torch.testing.assert_close(passes.used[-1][key], delta, **close, msg=lambda m, k=key: f"{k}: {m}")  # type: ignore[arg-type]
        mask = masks[key]
        if mask is not None:
            assert (delta[~mask] == 0).all()
            assert (delta[mask] != 0).any()
        assert logs[f"pass2/{key}_delta"] > 0
    total = task(deltas)
    named = dict(model.named_parameters())
    wanted = dict(zip(named, torch.autograd.grad(total, [*named.values()], allow_unused=True), strict=True))
    mine = gradients(model)
    for key, parameter in named.items():
        zeros = torch.zeros_like(parameter)
        theirs = zeros if wanted[key] is None else wanted[key]
        torch.testing.assert_close(
            mine.get(key, zeros), theirs, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}"
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["classification", "nlvr2_paired_attn", "visual_bert", "vilt", "lxmert"])
def test_padding_makes_no_difference(name: str, folder: Path) -> None:
    """With padding in the layers or without it, all perturbations and gradients are the same."""
    results = []
    for how in ("on", "off"):
        model, batch, loss = subject(name, folder)
        for module in model.modules():
            if hasattr(module, "padding_free"):
                module.padding_free = how
        passes = RecordingPasses(model.eval(), loss)
        points = {"text": "layer.0", "image": ["embeddings", "layer.0"]}
        VillaTrainer(VillaConfig(**SIZES, points=points, modality="both")).step(batch, passes)
        results.append((passes.used[-1], gradients(model)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def test_an_example_alone_moves_as_in_a_padded_batch(folder: Path) -> None:
    """The perturbation of a layer is that of its tokens: each example alone, without padding, has the same logits."""
    model, batch, _ = subject("classification", folder)
    model.eval()
    points, settings = model.other_points(), AscentSettings(0.1, init="normal", init_scale=1.0)
    from villa.adversarial.injection import inject

    key = "image.layer.0"
    delta = Perturbation(settings, 3)
    with inject(model, points, {key: delta}, batch):
        together = model(batch).logits
    assert batch.attention_mask is not None
    assert batch.region_mask is not None
    assert delta.delta is not None
    for row in range(len(batch)):
        words, regions = int(batch.attention_mask[row].sum()), int(batch.region_mask[row].sum())
        alone = Batch(
            ids=batch.ids[row : row + 1],
            input_ids=batch.input_ids[row : row + 1, :words],  # type: ignore[index]
            features=batch.features[row : row + 1, :regions],  # type: ignore[index]
            boxes=batch.boxes[row : row + 1, :regions],  # type: ignore[index]
        )
        width = batch.attention_mask.shape[1]
        own = torch.cat((delta.delta[row, :words], delta.delta[row, width : width + regions]))[None].detach()
        with inject(model, points, {key: Perturbation(settings, initial=own)}, alone):
            torch.testing.assert_close(model(alone).logits[0], together[row], rtol=1e-10, atol=1e-12)


def test_generated_tokens_are_never_perturbed(folder: Path) -> None:
    """Not in the embeddings nor in layers, even with padding: prompts, image tokens and answers are apart."""
    model, batch, _ = subject("llava", folder)
    points = {**model.perturbation_points(), **model.other_points()}
    assert batch.answer_mask is not None
    assert batch.answer_mask.any()
    for key in ("text", "text.layer.1", "image", "image.layer.1"):
        mask = points[key].mask(batch)
        assert points[key].confined
        assert mask is not None
        assert mask.any()
        assert not (mask & batch.answer_mask).any()
    text, image = (points[f"{m}.layer.0"].mask(batch) for m in ("text", "image"))
    assert text is not None
    assert image is not None
    assert not (text & image).any()


def test_layers_of_a_text_classifier(folder: Path) -> None:
    options = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    config = TextClassifierConfig(architecture="bert", options=options)
    model = TextClassifier.from_config(config, DataFacts(vocab_size=30, num_labels=2))
    assert [*model.other_points()] == ["text.layer.0", "text.layer.1", "text.layer.2"]
    mask = torch.tensor([[True, True, True], [True, True, False]])
    batch = Batch(["a", "b"], input_ids=torch.tensor([[2, 5, 3], [2, 3, 0]]), attention_mask=mask)
    batch = replace(batch, targets=torch.tensor([0, 1]))
    trainer = PgdTrainer(PgdConfig(modality="text", points={"text": ["layer.2", "layer.1"]}))
    trainer.check(model)
    passes = RecordingPasses(model, CrossEntropy())
    trainer.step(batch, passes)
    for delta in passes.used[-1].values():
        assert delta.shape == (2, 3, 16)
        assert (delta[1, 2] == 0).all()
        assert (delta[1, 1] != 0).all()


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({"text": "layer.9"}, r"trainer\.points\.text: 'layer\.9' is no point of \w+.*it has embeddings, layer\.0"),
        ({"image": "pixels"}, r"trainer\.points\.image: 'pixels'.*it has embeddings, layer\.0; pixels need a model"),
        ({"image": ["embeddings", "layr.0"]}, r"'layr\.0' is no point.*did you mean 'layer\.0'"),
    ],
)
def test_unknown_points_are_refused(points: Any, words: str, folder: Path) -> None:
    model, _, _ = subject("classification", folder)
    with pytest.raises(ConfigError, match=words):
        PgdTrainer(PgdConfig(points=points)).check(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": {"text": []}}, r"points\.text is \[\]; give the name of a point, or a list"),
        ({"points": {"text": 3}}, r"points\.text is 3; give the name"),
        ({"points": {"text": ["layer.0", "layer.0"]}}, "names a point twice"),
        (
            {"points": {"image": "pixels"}, "modality": "text"},
            r"points\.image has no effect with trainer\.modality=text",
        ),
        ({"points": {"sound": "layer.0"}}, r"points\.sound has no effect.*text and image"),
        ({"channels": [1.0, 1.0, 1.0]}, "factors for pixels in linf: set points.image"),
        (
            {"channels": [1.0], "points": {"image": "pixels"}, "norm": "linf"},
            "give three finite numbers",
        ),
    ],
)
def test_impossible_points_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PgdConfig(**options).check()
