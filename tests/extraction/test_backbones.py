"""Grids of backbones and boxes of transformers' detectors, tiny and with random weights, against the models alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from villa.datasets.own.grid import GridOptions, GridStore
from villa.datasets.stores import ImageSource
from villa.errors import ConfigError, VillaError
from villa.extraction.backbones import BackboneConfig, EfficientNetConfig, EfficientNetGrid, TransformersGrid
from villa.extraction.detectors import DetectorsConfig, TransformersDetector

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES: dict[str, Any] = {**TINY, "image_size": 32, "patch_size": 8}
RESNET: dict[str, Any] = {
    **{"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4},
    "layer_type": "basic",
}
WORDS = {**TINY, "vocab_size": 60, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def build(name: str) -> Any:
    """A tiny model of transformers; attributes of ``transformers`` are looked up when they are needed."""
    makers: dict[str, Callable[[Any], Any]] = {
        "clip": lambda t: t.CLIPModel(t.CLIPConfig(vision_config=PATCHES, text_config=WORDS, projection_dim=8)),
        "siglip": lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**PATCHES)),
        "dinov2": lambda t: t.Dinov2Model(t.Dinov2Config(**PATCHES)),
        "vit": lambda t: t.ViTModel(t.ViTConfig(**PATCHES)),
        "swin": lambda t: t.SwinModel(
            t.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32, patch_size=4, window_size=4)
        ),
        "resnet": lambda t: t.ResNetModel(t.ResNetConfig(**RESNET)),
        "detr": lambda t: t.DetrForObjectDetection(
            t.DetrConfig(
                backbone_config=t.ResNetConfig(**RESNET, out_features=["stage4"]),
                **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
                **{"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
                **{"num_queries": 20, "num_labels": 5},
            )
        ),
        "yolos": lambda t: t.YolosForObjectDetection(
            t.YolosConfig(**TINY, image_size=[64, 96], patch_size=16, num_detection_tokens=12, num_labels=5)
        ),
        "owlvit": lambda t: t.OwlViTForObjectDetection(
            t.OwlViTConfig(
                text_config={**TINY, "vocab_size": 600, "max_position_embeddings": 16},
                vision_config={**TINY, "image_size": 64, "patch_size": 16},
                projection_dim=16,
            )
        ),
    }
    torch.manual_seed(0)
    return makers[name](transformers).eval()


PROCESSORS: dict[str, dict[str, Any]] = {
    "detr": {"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 64, "longest_edge": 96}},
    "yolos": {"image_processor_type": "YolosImageProcessor", "size": {"shortest_edge": 64, "longest_edge": 96}},
    "owlvit": {"image_processor_type": "OwlViTImageProcessor", "size": {"height": 64, "width": 64}},
}


def save(name: str, folder: Path) -> Any:
    """Save a model with its processor, and return it."""
    model = build(name)
    model.save_pretrained(folder)
    values = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, **PROCESSORS.get(name, {})}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    if name == "owlvit":
        letters = [chr(code) for code in range(97, 123)]
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return model


def noise(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "vit", "swin", "resnet"])
def test_the_cells_of_a_backbone_are_regions(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    side = 64 if name == "resnet" else 32
    made = TransformersGrid(BackboneConfig(model=str(tmp_path), image_size=side), CPU)
    resized = np.asarray(noise().resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = torch.from_numpy(((resized - 0.4) / np.float32(0.3)).transpose(2, 0, 1))[None]
    with torch.inference_mode():
        last = getattr(model, "vision_model", model)(pixel_values=pixels).last_hidden_state
    cells = last.flatten(2).transpose(1, 2)[0] if last.dim() == 4 else last[0]
    count = {"resnet": 4}.get(name, 16)
    (regions,) = made([made.read(noise())])
    torch.testing.assert_close(torch.from_numpy(regions.features), cells[-count:], rtol=1e-4, atol=1e-5)
    assert made.selection.fixed == count
    grid = int(count**0.5)
    assert regions.boxes[1].tolist() == [1 / grid, 0, 2 / grid, 1 / grid]

    coarse = TransformersGrid(BackboneConfig(model=str(tmp_path), image_size=side, grid=1, whole=True), CPU)
    (few,) = coarse([coarse.read(noise())])
    np.testing.assert_allclose(few.features[1], regions.features.mean(0), rtol=1e-4, atol=1e-5)
    assert few.boxes.tolist() == [[0, 0, 1, 1]] * 2
    assert coarse.signature != made.signature


def test_images_of_other_sizes_have_more_cells(tmp_path: Path) -> None:
    save("vit", tmp_path)
    made = TransformersGrid(BackboneConfig(model=str(tmp_path), image_size=64), CPU)
    assert made([made.read(noise(1, 300))])[0].features.shape == (64, 16)
    for options, message in (({"grid": 9}, "finer than the 4 x 4 cells"), ({"grid": 0}, "grid=0 is too small")):
        with pytest.raises(ConfigError, match=message):
            TransformersGrid(BackboneConfig(model=str(tmp_path), **options), CPU)
    with pytest.raises(VillaError, match="is no model type of transformers"):
        TransformersGrid(BackboneConfig(model=str(tmp_path / "missing")), CPU)


def test_the_efficientnet_grid_is_that_of_own_data(photos: Path) -> None:
    files = sorted(photos.glob("plain*.png"))
    store = GridStore([ImageSource(file, "") for file in files], GridOptions(grid=2))
    store.prepare(range(len(files)))
    made = EfficientNetGrid(EfficientNetConfig(grid=2), CPU)
    found = made([made.read(Image.open(file)) for file in files])
    for index, regions in enumerate(found):
        features, boxes = store[index]
        # To the last bit of float16: sums depend on the size of a batch.
        np.testing.assert_allclose(regions.features, features.float(), rtol=2e-3, atol=2e-3)
        np.testing.assert_array_equal(regions.boxes, boxes)


@pytest.mark.parametrize(
    ("name", "features"), [("detr", "auto"), ("detr", "queries"), ("yolos", "auto"), ("owlvit", "auto")]
)
def test_the_boxes_of_a_detector_are_regions(name: str, features: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    classes = ["cat", "dog"] if name == "owlvit" else []
    config = DetectorsConfig(model=str(tmp_path), boxes="3:8:0.2", features=features, classes=classes)  # type: ignore[arg-type]
    made = TransformersDetector(config, CPU)
    prepared = made.read(noise())
    (regions,) = made([prepared])
    with torch.inference_mode():
        found = model(pixel_values=prepared.pixels, **made._texts)
    logits = found.logits[0]
    scores = logits.sigmoid() if classes else logits.softmax(-1)[:, :-1]
    confidence, objects = scores.max(-1)
    rows = confidence.argsort(descending=True, stable=True)
    centres = found.pred_boxes[0]
    boxes = torch.cat([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], -1).clamp(0, 1)
    rows = rows[(boxes[rows, 2:] > boxes[rows, :2]).all(-1)][: min(max(int((confidence > 0.2).sum()), 3), 8)]
    np.testing.assert_allclose(regions.boxes, boxes[rows], atol=1e-6)
    np.testing.assert_allclose(regions.confidence, confidence[rows], rtol=1e-5)
    assert regions.objects is not None
    assert regions.objects.tolist() == objects[rows].tolist()
    if features == "queries" or name == "yolos":
        np.testing.assert_allclose(regions.features, found.last_hidden_state[0][rows], rtol=1e-5, atol=1e-6)
    else:
        assert regions.features.shape == (len(rows), 16)
    if name != "owlvit":
        assert regions.soft_labels is not None
        np.testing.assert_allclose(regions.soft_labels[:, 0], logits.softmax(-1)[rows, -1], rtol=1e-5)


def test_what_a_detector_cannot_do_is_one_line(tmp_path: Path) -> None:
    for name in ("yolos", "vit"):
        save(name, tmp_path / name)
    mistakes: list[tuple[str, dict[str, Any], str]] = [
        ("yolos", {"features": "pooled"}, "no backbone with a map of features"),
        ("yolos", {"classes": ["cat"]}, "classes are for owlvit and owlv2"),
        ("yolos", {"overlap": 2.0}, "overlap=2.0"),
        ("vit", {}, "is no detector"),
    ]
    for name, options, message in mistakes:
        with pytest.raises(ConfigError, match=message):
            TransformersDetector(DetectorsConfig(model=str(tmp_path / name), **options), CPU)
