"""Attention cut by modality: the same parts for every model that has them, whatever the padding."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import test_huggingface as generative
import test_lxmert_model as lxmert
import test_vilt as vilt
import test_visual_bert as visual_bert
import torch
from random_batches import random_batch
from test_huggingface import work  # noqa: F401 - a fixture
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError
from villa.models.attention import LayerMaps
from villa.models.base import Model
from villa.models.uniter.model import Uniter

PARTS = ("text_text", "text_image", "image_text", "image_image")


def row(batch: Batch, number: int) -> Batch:
    """One example by itself, without padding."""
    real = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        real[field.name] = value[number : number + 1] if isinstance(value, Tensor | list) else value
    alone = Batch(**real)
    for mask, others in (("attention_mask", ("input_ids",)), ("region_mask", ("features", "boxes"))):
        kept = getattr(alone, mask)
        if kept is not None:
            length = int(kept.sum())
            alone = replace(alone, **{name: getattr(alone, name)[:, :length] for name in (mask, *others)})
    return alone


def assert_parts(model: Model, batch: Batch, *, joint: bool = True) -> None:
    """Queries give all their attention away, and padding changes nothing."""
    with torch.no_grad():
        together = model.attention_maps(batch)
    for number, found in enumerate(together):
        tokens, regions = len(found.tokens), len(found.boxes)
        for layer in found.layers:
            parts: dict[str, Tensor] = {
                name: getattr(layer, name) for name in PARTS if getattr(layer, name) is not None
            }
            for name, part in parts.items():
                queries, keys = ((tokens if side == "text" else regions) for side in name.split("_"))
                assert part.shape == (layer.heads, queries, keys)
            if joint:
                assert torch.allclose(parts["text_text"].sum(-1) + parts["text_image"].sum(-1), torch.ones(()))
                assert layer.pooled is not None
                assert torch.allclose(layer.pooled.sum(-1), torch.ones(()))
            else:
                assert all(torch.allclose(part.sum(-1), torch.ones(())) for part in parts.values())
        assert all(text.shape[0] == tokens and image.shape[0] == regions for text, image in found.states)
        with torch.no_grad():
            (alone,) = model.attention_maps(row(batch, number))
        for one, other in zip(found.layers, alone.layers, strict=True):
            for name in PARTS:
                if getattr(one, name) is not None:
                    assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-6)
        for ours, theirs in zip(found.states, alone.states, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("padding_free", ["on", "off"])
def test_uniter(tiny_uniter: Callable[..., Uniter], padding_free: str) -> None:
    model, batch = tiny_uniter(head="classification", padding_free=padding_free), random_batch(columns=7)
    assert_parts(model, batch)
    (_, second, _), output = model.attention_maps(batch), model(batch, attentions=True)
    assert torch.equal(second.layers[1].text_image, output.attentions[1][1, :, :7, 7:].detach())


def test_visual_bert() -> None:
    assert_parts(visual_bert.build(), visual_bert.regions())


def test_lxmert_has_both_ways_across() -> None:
    model, batch = lxmert.build(), random_batch()
    assert_parts(model, batch, joint=False)
    found, output = model.attention_maps(batch)[1], model(batch, attentions=True)
    assert [layer.name.split()[0] for layer in found.layers] == sorted(
        (layer.name.split()[0] for layer in found.layers), key=["language", "vision", "cross"].index
    )
    crossed = [layer for layer in found.layers if layer.name.startswith("cross")]
    for layer, theirs in zip(crossed, output.attentions[-len(crossed) :], strict=True):
        assert torch.allclose(layer.text_image, theirs[1].detach(), atol=1e-6)  # type: ignore[arg-type]
        assert layer.image_text is not None
    attention = model.lxmert.encoder.x_layers[0].visual_attention.att
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks


@pytest.mark.parametrize("padded", [True, False])
def test_vilt_has_a_grid(padded: bool) -> None:
    model, batch = vilt.build(), vilt.pictures(padded=padded)
    found = model.attention_maps(batch)
    for one in found:
        assert one.grid is not None
        assert len(one.boxes) == one.grid[0] * one.grid[1] == one.layers[0].text_image.shape[-1]  # type: ignore[union-attr]
        assert one.boxes[0, :2].tolist() == [0, 0]
        assert one.boxes[-1, 2:].tolist() == pytest.approx([1, 1])
        for layer in one.layers:
            assert layer.pooled is not None
            assert torch.allclose(layer.pooled.sum(-1), torch.ones(()))
    if padded:
        assert len({one.grid for one in found}) > 1


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_generative_models_look_from_text_to_image(name: str, work: Path) -> None:  # noqa: F811 - the fixture
    model, batch = generative.build(name, "generation", work), generative.batch_for(name, "generation", work)
    for found in model.attention_maps(batch):
        for layer in found.layers:
            assert layer.image_text is None
            assert layer.text_image is not None
            assert layer.pooled is not None
            assert torch.allclose(layer.pooled.sum(-1), torch.ones(()))
            assert layer.text_image[:, 0].sum() == pytest.approx(0, abs=1e-6) or found.tokens[0] > 0


def test_others_are_refused_in_a_line(work: Path, tiny_uniter: Callable[..., Uniter]) -> None:  # noqa: F811
    model, batch = generative.build("clip", "contrastive", work), generative.batch_for("clip", "contrastive", work)
    with pytest.raises(ConfigError, match="CLIPModel encodes images and texts apart"):
        model.attention_maps(batch)
    pair = tiny_uniter(head="nlvr2_paired_attn")
    with pytest.raises(ConfigError, match="one text and one image"):
        pair.attention_maps(random_batch(images=(3, 2, 5), columns=7))


def test_layers_without_text_count_their_heads() -> None:
    assert LayerMaps("vision 1", image_image=torch.zeros(3, 2, 2)).heads == 3
