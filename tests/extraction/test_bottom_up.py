"""The detector against what the published code computes, its two rules of choice, and weights that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from golden_utils import FOLDER, load
from PIL import Image
from test_detected_boxes import some_boxes, suppressed

from villa.errors import CheckpointError, ConfigError, VillaError
from villa.extraction.bottom_up import (
    BottomUp,
    BottomUpConfig,
    build_detector,
    choose_confident,
    load_detector,
    prepare,
)
from villa.extraction.faster_rcnn import Detection, DetectorConfig, FasterRCNN

CPU = torch.device("cpu")
#: The tolerances that come with the golden data: features vary by 15, boxes by tens of pixels.
FEATURES, BOXES = {"rtol": 0, "atol": 1e-4}, {"rtol": 0, "atol": 1e-2}


def opened(folder: Path, **options: Any) -> BottomUp:
    return BottomUp(BottomUpConfig(weights=str(folder), **options), CPU)


def pictures() -> list[Image.Image]:
    return [Image.fromarray(pixels.flip(-1).numpy()) for pixels in load("detector", "fixed36")["images_uint8_hwc_bgr"]]


def test_every_stage_is_that_of_the_published_code(detector: Path) -> None:
    made = opened(detector)
    for picture, result in zip(pictures(), load("detector", "fixed36")["results"], strict=True):
        prepared, expected = made.read(picture), result["rec"]
        if "images" in result:
            assert torch.equal(prepared.pixels, result["images"][0])
        size = (prepared.pixels.shape[1], prepared.pixels.shape[2])
        with torch.inference_mode():
            found = made.network(prepared.pixels[None], [size])[0]
        torch.testing.assert_close(found.proposals, expected["proposal_boxes"][0], **BOXES)
        torch.testing.assert_close(found.features, expected["feature_pooled"], **FEATURES)
        if "obj_logits" in expected:
            torch.testing.assert_close(found.objectness, expected["proposal_logits"][0], rtol=1e-5, atol=1e-4)
            for name, own in {"obj": found.classes, "attr": found.attributes}.items():
                torch.testing.assert_close(own, expected[f"{name}_logits"], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(found.deltas, expected["box_deltas"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "boxes"), [("fixed36", "36"), ("fixed36_many_thresholds", "36"), ("adaptive_10_100", "10:100")]
)
def test_the_chosen_boxes_are_those_of_the_published_code(
    detector: Path, tmp_path: Path, case: str, boxes: str
) -> None:
    golden = load("detector", case)
    (tmp_path / "pytorch_model.bin").symlink_to(detector / "pytorch_model.bin")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(golden["config"]))
    made = opened(tmp_path, boxes=boxes)
    # All together: each has the same result as alone.
    found = made([made.read(picture) for picture in pictures()])
    for regions, result in zip(found, golden["results"], strict=True):
        expected = result["out"]
        count = int(expected["preds_per_image"][0]) if "preds_per_image" in expected else expected["obj_ids"].shape[1]
        assert regions.objects is not None
        assert regions.attributes is not None
        assert regions.objects.tolist() == expected["obj_ids"][0, :count].tolist()
        assert regions.attributes.tolist() == expected["attr_ids"][0, :count].tolist()
        np.testing.assert_allclose(
            regions.boxes, expected["normalized_boxes"][0, :count], rtol=0, atol=1e-2 / max(regions.size)
        )
        np.testing.assert_allclose(regions.confidence, expected["obj_probs"][0, :count], rtol=0, atol=1e-5)
        if "roi_features" in expected:
            np.testing.assert_allclose(regions.features, expected["roi_features"][0, :count], **FEATURES)
            np.testing.assert_allclose(
                regions.attribute_confidence, expected["attr_probs"][0, :count], rtol=0, atol=1e-5
            )


def test_padding_takes_part_as_in_the_published_code() -> None:
    golden = load("detector", "batch2_padded")
    network = build_detector(load("detector", "model"), DetectorConfig.of_hub(golden["config"]))
    expected = golden["result"]["rec"]
    with torch.inference_mode():
        found = network(golden["result"]["images"], [tuple(size) for size in golden["result"]["sizes"].tolist()])
    for place, detection in enumerate(found):
        torch.testing.assert_close(detection.proposals, expected["proposal_boxes"][place], **BOXES)
        torch.testing.assert_close(detection.objectness, expected["proposal_logits"][place], rtol=1e-5, atol=1e-4)


def test_the_whole_detector_has_the_published_parameters() -> None:
    shapes = json.loads((FOLDER / "detector" / "keys.json").read_text())
    with torch.device("meta"):
        network = FasterRCNN({name: torch.Size(shape) for name, shape in shapes.items()}, DetectorConfig())
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == shapes


def by_the_tool(boxes: torch.Tensor, scores: np.ndarray[Any, Any], least: int, most: int, threshold: float) -> set[int]:
    """The rule of bottom-up-attention's generate_tsv, class by class; the background is the first column."""
    confidence = np.zeros(len(boxes))
    for column in scores.T[1:]:
        for row in suppressed(boxes, torch.from_numpy(column), 0.3, 1):
            confidence[row] = max(confidence[row], column[row])
    sure = np.flatnonzero(confidence >= threshold)
    ranked = np.argsort(-confidence, kind="stable")
    return {*(ranked[:least] if len(sure) < least else ranked[:most] if len(sure) > most else sure).tolist()}


@pytest.mark.parametrize(("least", "most", "threshold"), [(10, 100, 0.2), (10, 20, 0.2), (30, 100, 0.6)])
@pytest.mark.parametrize("caffe", [False, True])
def test_the_rule_of_the_caffe_tool(least: int, most: int, threshold: float, caffe: bool) -> None:
    random = torch.Generator().manual_seed(0)
    boxes, logits = some_boxes(90), 3 * torch.randn(90, 6, generator=random)
    scores = logits.softmax(-1)
    given = logits if caffe else logits.roll(-1, -1)
    found = Detection(boxes, torch.zeros(90), torch.zeros(90, 4), given, torch.zeros(90, 24), None)
    config = DetectorConfig(caffe=True) if caffe else DetectorConfig()
    chosen = choose_confident(found, least, most, threshold, config)
    if caffe:
        assert {*chosen.rows.tolist()} == by_the_tool(boxes, scores.numpy(), least, most, threshold)
    assert least <= len(chosen.rows) <= most
    assert chosen.confidence.tolist() == sorted(chosen.confidence.tolist(), reverse=True)
    assert torch.equal(chosen.boxes, boxes[chosen.rows])
    assert torch.equal(chosen.objects, scores[:, 1:].argmax(-1)[chosen.rows])


def in_caffe(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same network in the convention of a detector converted from caffe."""
    head, predictor = "proposal_generator.rpn_head.", "roi_heads.box_predictor."
    names = {"cls_embedding": "cls_embed", "fc_attr": "attr_linear1", "attr_score": "attr_linear2"}
    made = {}
    for name, value in weights.items():
        part, changed = name.removeprefix(predictor), value
        if part.startswith(("cls_score", "cls_embedding", "attr_score")):
            changed = value.roll(1, 0)  # the background first
        elif part.startswith("bbox_pred"):
            changed = torch.cat([torch.zeros_like(value[:4]), value])
        elif name.startswith(f"{head}objectness_logits"):
            changed = torch.cat([torch.zeros_like(value), value])  # the background of all anchors, then the foreground
        renamed = next(
            (part.replace(ours, theirs) for ours, theirs in names.items() if part.startswith(f"{ours}.")), part
        )
        made[predictor + renamed if part != name else name] = changed
    return made


def test_a_detector_converted_from_caffe_is_the_same_network(tmp_path: Path) -> None:
    weights = load("detector", "model")
    torch.save({"model": in_caffe(weights), "iteration": 3}, tmp_path / "caffe.pth")
    network, _ = load_detector(str(tmp_path / "caffe.pth"))
    assert network.config == DetectorConfig.of_caffe()
    hub = build_detector(weights, DetectorConfig.of_hub(load("detector", "fixed36")["config"]))
    images = prepare(np.asarray(pictures()[0]), hub.config).pixels[None]
    with torch.inference_mode():
        maps = hub.backbone(images)
        (ours, deltas), (theirs, same) = (one.proposal_generator["rpn_head"](maps) for one in (hub, network))
        torch.testing.assert_close(ours.sigmoid(), theirs)
        assert torch.equal(deltas, same)
        features = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
        ours, theirs = (one.roi_heads["box_predictor"](features) for one in (hub, network))
    torch.testing.assert_close(ours[0].roll(1, -1), theirs[0])
    torch.testing.assert_close(ours[1], theirs[1][:, 4:])
    torch.testing.assert_close(ours[2].roll(1, -1), theirs[2])
    made = opened(tmp_path / "caffe.pth", boxes="10:100:0.2", min_size=96, max_size=160)
    assert made.signature.startswith("bottom_up_caffe 1 ")
    (regions,) = made([made.read(pictures()[0])])
    assert 10 <= len(regions.boxes) <= 100
    assert ((regions.boxes >= 0) & (regions.boxes <= 1)).all()


def test_large_images_are_resized_without_floats_of_all_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, config = np.asarray(pictures()[2]), DetectorConfig(min_size=30, max_size=70)
    whole = prepare(pixels, config)
    monkeypatch.setattr("villa.extraction.bottom_up.LARGE", 0)
    sampled = prepare(pixels, config)
    # Of 256 levels: torch computes the places of the samples in float32.
    torch.testing.assert_close(whole.pixels, sampled.pixels, rtol=0, atol=2e-3)
    assert whole[1:] == sampled[1:]


def test_signatures_follow_weights_and_reading_but_not_files_and_boxes(detector: Path, tmp_path: Path) -> None:
    plain = opened(detector).signature
    torch.save({"state_dict": load("detector", "model")}, tmp_path / "copy.pth")
    (tmp_path / "config.yaml").write_bytes((detector / "config.yaml").read_bytes())
    assert opened(tmp_path / "copy.pth", boxes="10:100:0.2").signature == plain
    changed = {**load("detector", "model")}
    changed["backbone.stem.conv1.weight"] = changed["backbone.stem.conv1.weight"] + 1e-3
    torch.save(changed, tmp_path / "copy.pth")
    others = [opened(tmp_path / "copy.pth"), opened(detector, min_size=64), opened(detector, channels="rgb")]
    assert len({plain, *(other.signature for other in others)}) == 4


def test_what_is_no_detector_is_one_line(detector: Path, tmp_path: Path) -> None:
    weights = load("detector", "model")
    name = "roi_heads.box_predictor.cls_score.bias"
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "other": ({"linear.weight": torch.zeros(2, 2)}, "not the weights of a bottom-up-attention detector"),
        "lacking": ({key: value for key, value in weights.items() if key != name}, f"lack '{name}'"),
        "nan": ({**weights, name: weights[name] * torch.nan}, "NaN"),
    }
    for case, (content, message) in cases.items():
        torch.save(content, tmp_path / f"{case}.pth")
        with pytest.raises(CheckpointError, match=message):
            opened(tmp_path / f"{case}.pth")
    (tmp_path / "faster_rcnn.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    mistakes: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "faster_rcnn.pkl", {}, "a pickle may run code"),
        (tmp_path / "missing.pth", {}, "does not exist"),
        ("nobody/no-detector", {}, "cannot be downloaded"),
        (detector, {"boxes": "many"}, "boxes='many'"),
        (detector, {"boxes": "100:10"}, "min_boxes"),
        (detector, {"min_size": 2000, "max_size": 100}, "min_size"),
        (detector, {"convention": "caffe"}, "of another convention"),
    ]
    for source, options, message in mistakes:
        with pytest.raises(VillaError, match=message) as caught:
            opened(source, **options)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.yaml").write_text("INPUT: {MIN_SIZE_TEST: [wide]}")
    torch.save(weights, tmp_path / "copy.pth")
    with pytest.raises(ConfigError, match=r"INPUT\.MIN_SIZE_TEST"):
        opened(tmp_path / "copy.pth")
