"""Training of ViLT and VisualBERT against the loop without hooks, on padded batches in double precision."""

from typing import Any, cast

import pytest
import torch
from adversarial_oracle import assert_equals_loop, oracle
from tiny import RecordingPasses
from torch import Tensor

from villa.batch import Batch
from villa.facts import DataFacts
from villa.losses.base import Loss
from villa.losses.classification import BinaryCrossEntropy, CrossEntropy
from villa.models.base import Model, ModelOutput
from villa.models.vilt import Vilt, ViltConfig
from villa.models.visual_bert import VisualBert, VisualBertConfig
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "max_positions": 10,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.3,
}
WIDTHS = {"vilt": {"text": 16, "image": 16}, "visual_bert": {"text": 16, "image": 6}}
LOSSES: dict[str, Loss] = {"answers": BinaryCrossEntropy(), "nlvr2": CrossEntropy()}
CASES = [(name, head) for name in WIDTHS for head in LOSSES]
MODALITIES = ("text", "image", "both", "alternating")
STEPS: dict[str, Any] = {"steps": 3, "text_step_size": 0.3, "image_step_size": 0.4, "init": "zero"}


def build(name: str, head: Any) -> Model:
    torch.manual_seed(0)
    facts = DataFacts(30, 2 if head == "nlvr2" else 5, 6)
    if name == "vilt":
        config = ViltConfig(**SIZES, head=head, image_size=8, patch_size=4)
        return Vilt.from_config(config, facts).double()
    return VisualBert.from_config(VisualBertConfig(**SIZES, head=head), facts).double()


def padded_batch(name: str, head: str) -> Batch:
    """Two examples with texts of different lengths, and images with different numbers of patches or regions."""
    torch.manual_seed(1)
    images = (2, 2) if head == "nlvr2" else (2,)
    words = torch.arange(6) < torch.tensor([[6], [4]])
    targets = torch.tensor([1, 0]) if head == "nlvr2" else torch.rand(2, 5, dtype=torch.float64)
    texts: dict[str, Any] = {"input_ids": torch.randint(1, 30, (2, 6)) * words, "attention_mask": words}
    if name == "vilt":
        mask = torch.ones(*images, 8, 12)
        mask[1, ..., 4:, :] = 0
        mask[0, ..., 8:] = 0
        pixels = torch.randn(*images, 3, 8, 12, dtype=torch.float64)
        seen: dict[str, Any] = {"pixel_values": pixels, "inputs": {"pixel_mask": mask}}
    else:
        real = torch.arange(5) < torch.randint(2, 5, (*images, 1))
        features, boxes = (torch.randn(*images, 5, width, dtype=torch.float64) for width in (6, 4))
        seen = {"features": features, "boxes": boxes, "region_mask": real}
    return Batch(["a", "b"], **texts, **seen, targets=targets)


def score(model: Model, batch: Batch, text: Tensor, image: Tensor) -> Tensor:
    """The logits with perturbations, written out as far as these go."""
    if isinstance(model, Vilt):
        return score_vilt(model, batch, text, image)
    return score_visual_bert(cast("VisualBert", model), batch, text, image)


def score_vilt(model: Vilt, batch: Batch, text: Tensor, image: Tensor) -> Tensor:
    """One row after another, each without its padding."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.pixel_values is not None
    assert batch.inputs is not None
    embeddings, words = model.vilt.embeddings, model.vilt.embeddings.text_embeddings
    pixels, masks = batch.pixel_values.flatten(0, -4), batch.inputs["pixel_mask"].flatten(0, -3)
    maps = embeddings.patch_embeddings.projection(pixels)
    maps = maps + image.transpose(1, 2).reshape(maps.shape)
    positions = embeddings.position_embeddings[0, 1:].T.reshape(1, 16, 2, 2)
    pooled = []
    for row in range(len(pixels)):
        example, which = row // model.images, row % model.images
        count = int(batch.attention_mask[example].sum())
        vectors = words.word_embeddings(batch.input_ids[example]) + text[row] + words.token_type_embeddings.weight[0]
        vectors = words.LayerNorm(vectors + words.position_embeddings.weight[:6])[:count]
        height, width = int(masks[row, :, 0].sum()) // 4, int(masks[row, 0].sum()) // 4
        stretched = torch.nn.functional.interpolate(positions, (height, width), mode="bilinear", align_corners=True)
        patches = (maps[row, :, :height, :width] + stretched[0]).flatten(1).T
        whole = embeddings.cls_token[0] + embeddings.position_embeddings[0, :1]
        kinds = embeddings.token_type_embeddings.weight
        states = torch.cat((vectors + kinds[0], torch.cat((whole, patches)) + kinds[1 + which]))[None]
        states = model.vilt.layernorm(model.vilt.encoder(states).last_hidden_state)
        pooled.append(model.vilt.pooler(states)[0])
    return cast("Tensor", model.classifier(torch.stack(pooled).reshape(len(batch), -1)))


def score_visual_bert(model: VisualBert, batch: Batch, text: Tensor, image: Tensor) -> Tensor:
    """One example after another, each without its padding."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.features is not None
    assert batch.region_mask is not None
    embeddings = model.visual_bert.embeddings
    features, regions = batch.features, batch.region_mask
    kinds = torch.ones(5, dtype=torch.long)
    if features.dim() == 4:
        features, regions, kinds = features.flatten(1, 2), regions.flatten(1), torch.arange(2).repeat_interleave(5)
    logits = []
    for i in range(len(batch)):
        count = int(batch.attention_mask[i].sum())
        vectors = embeddings.word_embeddings(batch.input_ids[i]) + text[i] + embeddings.token_type_embeddings.weight[0]
        vectors = (vectors + embeddings.position_embeddings.weight[:6])[:count]
        seen = embeddings.visual_projection(features[i] + image[i]) + embeddings.visual_position_embeddings.weight[0]
        seen = (seen + embeddings.visual_token_type_embeddings(kinds))[regions[i]]
        states = model.visual_bert.encoder(embeddings.LayerNorm(torch.cat((vectors, seen)))[None]).last_hidden_state
        read = states[0, count - 2] if model.images == 1 else model.visual_bert.pooler(states)[0]
        logits.append(model.cls(read))
    return torch.stack(logits)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(("name", "head"), CASES)
def test_villa_equals_the_loop_without_hooks(name: str, head: str, modality: Any) -> None:
    config = VillaConfig(**STEPS, modality=modality, kl_weight=1.5)
    model, batch, loss = build(name, head), padded_batch(name, head), LOSSES[head]
    expected = oracle(model, batch, config, score, loss, WIDTHS[name])
    assert len(expected[1]) == 3
    passes = RecordingPasses(model, loss)
    logs = VillaTrainer(config).step(batch, passes)
    assert_equals_loop(model, passes, expected, modality, clean=1, unused=True, rtol=1e-8, atol=1e-11)
    assert all(0 < logs[f"pass{t}/kl"].item() < float("inf") for t in (1, 2))


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(("name", "head"), CASES)
def test_freelb_equals_the_loop_without_hooks(name: str, head: str, modality: Any) -> None:
    model, batch, loss = build(name, head), padded_batch(name, head), LOSSES[head]
    plain = VillaConfig(**STEPS, modality=modality, kl_weight=0.0, clean_loss=False, average_views=True)
    expected = oracle(model, batch, plain, score, loss, WIDTHS[name])
    assert len(expected[1]) == 3
    passes = RecordingPasses(model, loss)
    FreeLBTrainer(FreeLBConfig(**STEPS, modality=modality)).step(batch, passes)
    assert_equals_loop(model, passes, expected, modality, clean=0, unused=True, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_standard_training_is_the_gradient_of_the_loss(name: str, head: str) -> None:
    model, batch, loss = build(name, head), padded_batch(name, head), LOSSES[head]
    zeros = {
        modality: torch.zeros(*point.mask(batch).shape, WIDTHS[name][modality], dtype=torch.float64)  # type: ignore[union-attr]
        for modality, point in model.perturbation_points().items()
    }
    value = loss(ModelOutput(score(model, batch, **zeros)), batch)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    StandardTrainer(StandardTrainer.Config()).step(batch, RecordingPasses(model, loss))
    for (key, parameter), gradient in zip(named.items(), found, strict=True):
        if parameter.grad is None:
            assert gradient is None or gradient.abs().sum() == 0, key
        else:
            wanted = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-8, atol=1e-11)
