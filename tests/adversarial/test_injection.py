"""Perturbations enter where the model says, once a pass, and leave no trace."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.injection import inject
from villa.adversarial.perturbation import Perturbation
from villa.models.base import Point

SETTINGS = AscentSettings(step_size=0.5, init="uniform", init_scale=1.0)


def test_the_output_is_that_of_the_perturbed_embedding_and_hooks_are_gone() -> None:
    model, batch = tiny_model(), tiny_batch()
    text, image = Perturbation(SETTINGS, 1), Perturbation(SETTINGS, 2)
    clean = model(batch).logits
    with inject(model, model.perturbation_points(), {"text": text, "image": image}, batch):
        perturbed = model(batch).logits
    assert text.delta is not None
    assert image.delta is not None
    words = model.words(batch.input_ids) + text.delta
    regions = model.regions(batch.features + image.delta)
    weigh = lambda values, mask: (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # noqa: E731
    pooled = torch.cat((weigh(words, batch.attention_mask), weigh(regions, batch.region_mask)), -1)
    torch.testing.assert_close(perturbed, model.head(pooled), rtol=1e-12, atol=1e-12)
    assert torch.equal(model(batch).logits, clean)


def test_hooks_are_gone_after_an_error() -> None:
    model, batch = tiny_model(), tiny_batch()
    with (
        pytest.raises(ValueError, match="inside"),
        inject(model, model.perturbation_points(), {"text": Perturbation(SETTINGS)}, batch),
    ):
        raise ValueError("inside")
    assert not model.words._forward_hooks


def test_a_point_that_is_not_reached_is_an_error() -> None:
    model, batch = tiny_model(), tiny_batch()
    with (
        pytest.raises(RuntimeError, match="called 0 times"),
        inject(model, {"text": Point("words", "output")}, {"text": Perturbation(SETTINGS)}, batch),
    ):
        pass


def test_sizes_are_measured_relative_to_the_real_part_of_the_embedding() -> None:
    model, batch = tiny_model(), tiny_batch()
    text = Perturbation(SETTINGS, 1)
    with inject(model, model.perturbation_points(), {"text": text}, batch):
        model(batch)
    assert text.delta is not None
    assert text.relative_size is not None
    real = model.words(batch.input_ids) * batch.attention_mask[..., None]
    expected = (text.delta.flatten(1).norm(dim=1) / real.flatten(1).norm(dim=1)).mean()
    torch.testing.assert_close(text.relative_size, expected.detach(), rtol=1e-12, atol=0)
    text.delta = 2 * text.delta.detach()
    with inject(model, model.perturbation_points(), {"text": text}, batch):
        model(batch)
    torch.testing.assert_close(text.relative_size, 2 * expected.detach(), rtol=1e-12, atol=0)


def test_a_frozen_perturbation_asks_for_no_gradient() -> None:
    model, batch = tiny_model(), tiny_batch()
    text = Perturbation(SETTINGS, 1)
    text.frozen = True
    with inject(model, model.perturbation_points(), {"text": text}, batch):
        model(batch).logits.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient"):
        text.ascend()


def test_half_precision_embeddings_keep_their_type_and_the_perturbation_is_fp32() -> None:
    perturbation = Perturbation(AscentSettings(step_size=1.0, init="normal", init_scale=1.0))
    perturbation.begin(None)
    assert perturbation.apply(torch.ones(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert perturbation.delta is not None
    assert perturbation.delta.dtype == torch.float32
