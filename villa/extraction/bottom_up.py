"""Bottom-up attention as an extractor: weights, preprocessing, and the choice of an image's boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from omegaconf import MISSING
from PIL import Image
from torch import Tensor

from villa.checkpoints.weight_files import FOLDER_FILES, read_weights, refuse_not_finite
from villa.errors import CheckpointError, ConfigError, reading
from villa.extraction.base import Extractor, ExtractorConfig, Regions, describe, hash_weights, parse_boxes
from villa.extraction.boxes import clip, regress, suppress, suppress_classes
from villa.extraction.faster_rcnn import Detection, DetectorConfig, FasterRCNN
from villa.registry import register_extractor
from villa.vetting import vetted_source

CONFIG_FILE = "config.yaml"
#: Thresholds of the published code, tried in order until there are boxes enough.
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Overlap above which a class keeps only the better box, in the caffe tool.
CLASS_OVERLAP = 0.3
#: Pixels of an image above which only those that are sampled become floats.
LARGE = 1 << 24
#: Least height and width that the stem can pool.
_LEAST = 3
_PREDICTOR = "roi_heads.box_predictor."
#: Names of a detector converted from caffe for detectron2, and ours.
_CAFFE_NAMES = {"cls_embed.": "cls_embedding.", "attr_linear1.": "fc_attr.", "attr_linear2.": "attr_score."}


@dataclass
class BottomUpConfig(ExtractorConfig):
    """Options of bottom-up attention.

    Attributes:
        weights: the detector: a file, a folder with ``pytorch_model.bin`` or ``model.safetensors`` (and
            ``config.yaml``), or a name on the hub (``unc-nlp/frcnn-vg-finetuned``).
        boxes: boxes of an image. ``36`` or ``10:100``: the published code's choice of so many (regressed boxes, one
            class each). ``10:100:0.2``: the caffe tool's, with which UNITER's and VILLA's databases were made
            (proposals that a class scores higher than 0.2).
        convention: ``caffe`` for weights converted from caffe layer by layer, ``hub`` for those of transformers'
            example code; ``auto`` decides by their shapes.
        channels: order of the colours that the network reads: ``bgr`` is that of all published weights.
        min_size: length that the short side is resized to; None takes the detector's (800, with caffe 600).
        max_size: length that the long side may have; None takes the detector's (1333, with caffe 1000).
        thresholds: overlaps tried in order by the published code's choice until there are boxes enough; empty takes
            those of ``config.yaml``, or 0.5, 0.6, ..., 1.
        soft_labels: whether to store the distribution of classes of every box.
    """

    weights: str = MISSING
    boxes: str = "36"
    convention: Literal["auto", "hub", "caffe"] = "auto"
    channels: Literal["bgr", "rgb"] = "bgr"
    min_size: int | None = None
    max_size: int | None = None
    thresholds: list[float] = field(default_factory=list)
    soft_labels: bool = True


class Prepared(NamedTuple):
    """A preprocessed image.

    Attributes:
        pixels: ``[3, H, W]``.
        size: height and width in pixels as it was.
        scale: factors by which height and width were resized.
    """

    pixels: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]


class Choice(NamedTuple):
    """Chosen boxes, R of P proposals.

    Attributes:
        rows: their proposals ``[R]``, by falling confidence.
        boxes: ``[R, 4]`` in pixels of the resized image.
        confidence: ``[R]``.
        objects: classes ``[R]`` without the background.
    """

    rows: Tensor
    boxes: Tensor
    confidence: Tensor
    objects: Tensor


@register_extractor("bottom_up")
class BottomUp(Extractor):
    """Bottom-up attention: boxes, features, objects and attributes of a Faster R-CNN trained on Visual Genome."""

    Config = BottomUpConfig

    def __init__(self, config: BottomUpConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.selection = parse_boxes(config.boxes)
        self.by_confidence = config.boxes.count(":") == 2
        self.network, stored = load_detector(config.weights, config.convention)
        sizes = {name: getattr(config, name) for name in ("min_size", "max_size")}
        self.detector = replace(self.network.config, **{name: size for name, size in sizes.items() if size is not None})
        if not 1 <= self.detector.min_size <= self.detector.max_size:
            raise ConfigError(
                f"min_size={self.detector.min_size} and max_size={self.detector.max_size} do not fit; give "
                "1 <= min_size <= max_size"
            )
        self.network.config = self.detector
        self.thresholds = tuple(config.thresholds or stored or THRESHOLDS)
        self.weights = hash_weights(self.network)
        self.network.to(device)

    @property
    def signature(self) -> str:
        """Weights, and all that differs from the published detector."""
        usual = DetectorConfig.of_caffe() if self.detector.caffe else DetectorConfig()
        own = asdict(self.detector)
        skipped = ("anchor_sizes", "anchor_ratios")  # the weights have them
        options = {name: value for name, value in own.items() if value != getattr(usual, name) and name not in skipped}
        options |= {} if self.config.channels == "bgr" else {"channels": self.config.channels}
        shown = {name: str(value).replace(" ", "") for name, value in options.items()}
        return describe("bottom_up_caffe" if self.detector.caffe else "bottom_up", self.weights, shown)

    def read(self, picture: Image.Image) -> Prepared:
        """Resize and centre an image."""
        pixels = np.asarray(picture)
        return prepare(pixels[:, :, ::-1] if self.config.channels == "bgr" else pixels, self.detector)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Prepared]) -> list[Regions]:
        """Detect image by image, because the padding of a batch would take part in the result."""
        return [self._detect(picture) for picture in pictures]

    def _detect(self, picture: Prepared) -> Regions:
        pixels = picture.pixels[None].to(self.device)
        size = (pixels.shape[2], pixels.shape[3])
        padded = F.pad(pixels, (0, max(_LEAST - size[1], 0), 0, max(_LEAST - size[0], 0)))
        found = self.network(padded, [size], [picture.scale[0]])[0]
        chosen = self.choose(found, size)
        return self._regions(found, chosen, picture)

    def choose(self, found: Detection, size: tuple[int, int]) -> Choice:
        """Choose boxes by the rule of the options; ``size`` is the resized image's."""
        bounds = self.selection
        if self.by_confidence:
            return choose_confident(found, bounds.min_boxes, bounds.max_boxes, bounds.threshold, self.detector)
        least, most = (bounds.min_boxes, bounds.max_boxes) if bounds.fixed is None else (bounds.fixed, bounds.fixed)
        return choose_best(found, least, most, self.thresholds, size, self.detector)

    def _regions(self, found: Detection, chosen: Choice, picture: Prepared) -> Regions:
        rows = chosen.rows
        probabilities = found.classes[rows].softmax(-1)
        if not self.detector.caffe:  # the databases have the background first
            probabilities = probabilities.roll(1, -1)
        sure, attributes = None, None
        if found.attributes is not None:
            sure, attributes = self._attribute_scores(found.attributes[rows]).max(-1)
        scale, limits = (chosen.boxes.new_tensor([*pair[::-1]] * 2) for pair in (picture.scale, picture.size))
        boxes = torch.minimum(chosen.boxes / scale, limits) / limits
        return Regions(
            picture.size,
            found.features[rows].float().cpu().numpy(),
            boxes.cpu().numpy(),
            chosen.confidence.cpu().numpy(),
            chosen.objects.cpu().numpy(),
            None if attributes is None else attributes.cpu().numpy(),
            None if sure is None else sure.cpu().numpy(),
            probabilities.cpu().numpy() if self.config.soft_labels else None,
        )

    def _attribute_scores(self, logits: Tensor) -> Tensor:
        """Return the probabilities of attributes; the published code leaves "none" out before, caffe after."""
        if self.detector.caffe:
            return without_background(logits.softmax(-1), first=True)
        return without_background(logits, first=False).softmax(-1)


def load_detector(
    source: str, convention: Literal["auto", "hub", "caffe"] = "auto"
) -> tuple[FasterRCNN, tuple[float, ...]]:
    """Load a detector on the CPU.

    Args:
        source: see ``BottomUpConfig.weights``.
        convention: see ``BottomUpConfig.convention``.

    Returns:
        The network, and the thresholds of its ``config.yaml`` (empty without).

    Raises:
        CheckpointError: there are no such weights, they cannot be read safely, or are of something else.
    """
    place = Path(source).expanduser()
    if not place.exists() and source.count("/") == 1 and not source.startswith((".", "~", "/")):
        advice = "give a file or folder of this machine, or a name on the hub (owner/name) with a connection"
        with reading(f"the detector '{source}' is not here, and cannot be downloaded", advice, CheckpointError):
            place = vetted_source(source, [*FOLDER_FILES, CONFIG_FILE])
    if place.suffix in (".pkl", ".caffemodel"):
        raise CheckpointError(
            f"'{place}' is not read: a pickle may run code, and caffe's format is not PyTorch's; if you trust its "
            "source, convert it to a state_dict (torch.save({name: torch.from_numpy(array)}, 'detector.pth'))"
        )
    weights = read_weights(place)
    refuse_not_finite(place, weights.items())
    of_caffe = f"{_PREDICTOR}attr_linear1.weight" in weights or _is_paired(weights)
    caffe = of_caffe if convention == "auto" else convention == "caffe"
    weights = {
        _own_name(name): value.float() if value.is_floating_point() else value for name, value in weights.items()
    }
    file = (place if place.is_dir() else place.parent) / CONFIG_FILE
    values = _hub_config(file) if file.is_file() and not caffe else {}
    config = DetectorConfig.of_caffe() if caffe else DetectorConfig.of_hub(values)
    tried = values.get("ROI_HEADS", {}).get("NMS_THRESH_TEST", ())
    return build_detector(weights, config), tuple(tried if isinstance(tried, list | tuple) else [tried])


def build_detector(weights: Mapping[str, Tensor], config: DetectorConfig) -> FasterRCNN:
    """Build a detector of given weights.

    Raises:
        CheckpointError: they are of something else.
    """
    network = FasterRCNN({name: value.shape for name, value in weights.items()}, config)
    own = network.state_dict()
    for name, value in own.items():
        given = weights.get(name)
        if given is None and not name.endswith(("num_batches_tracked", "cell_anchors.0")):
            raise CheckpointError(f"the detector's weights lack '{name}'; give a whole file")
        if given is not None and given.shape != value.shape:
            raise CheckpointError(
                f"the detector's '{name}' has the shape {list(given.shape)}, not {list(value.shape)}: these are "
                "weights of another convention or configuration (convention=hub or caffe)"
            )
    network.load_state_dict({name: weights.get(name, value) for name, value in own.items()})
    return network


def prepare(pixels: Any, config: DetectorConfig) -> Prepared:
    """Preprocess an image ``[H, W, 3]`` of bytes, whose channels are in the order of ``config.mean``."""
    height, width = pixels.shape[:2]
    size, scale = resized_size(height, width, config)
    factors = (height / size[0], width / size[1])  # original pixels a resized one
    if config.caffe:
        factors = (1 / scale, 1 / scale)
    if height * width > LARGE or config.caffe:
        found = _sampled(pixels, size, factors)
    else:
        image = torch.from_numpy(np.array(pixels)).float().permute(2, 0, 1)[None]
        found = F.interpolate(image, size, mode="bilinear", align_corners=False)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return Prepared((found - mean) / std, (height, width), (1 / factors[0], 1 / factors[1]))


def resized_size(height: int, width: int, config: DetectorConfig) -> tuple[tuple[int, int], float]:
    """Return height and width to resize an image to, and the factor."""
    short, long = min(height, width), max(height, width)
    scale = config.min_size / short
    if config.caffe:
        if round(scale * long) > config.max_size:
            scale = config.max_size / long
        return (max(round(height * scale), 1), max(round(width * scale), 1)), scale
    sides = [config.min_size if side == short else scale * side for side in (height, width)]
    if max(sides) > config.max_size:
        scale = config.max_size / max(sides)
        sides = [side * scale for side in sides]
    return (max(int(sides[0] + 0.5), 1), max(int(sides[1] + 0.5), 1)), sides[0] / height


def choose_best(
    found: Detection, least: int, most: int, thresholds: Sequence[float], size: tuple[int, int], config: DetectorConfig
) -> Choice:
    """Choose boxes as the published code: every proposal has its best class and that class's regressed box.

    The boxes that overlap no surer one are kept, whatever the class, by the first threshold with which at least
    ``least`` are; of more than ``most`` the surest. If no threshold keeps enough, those of the last.
    """
    scores = without_background(found.classes.softmax(-1), first=config.caffe)
    confidence, objects = scores.max(-1)
    deltas = found.deltas.view(len(scores), -1, 4)
    deltas = deltas[:, 1:] if config.caffe else deltas
    own = deltas[torch.arange(len(objects), device=objects.device), objects.clamp(max=deltas.shape[1] - 1)]
    boxes = clip(regress(found.proposals, own, config.box_weights, config.extent), *size, config.extent)
    rows = objects
    for threshold in thresholds:
        rows = suppress(boxes, confidence, threshold, extent=config.extent)
        if len(rows) >= least:
            break
    rows = rows[:most]
    return Choice(rows, boxes[rows], confidence[rows], objects[rows])


def choose_confident(found: Detection, least: int, most: int, threshold: float, config: DetectorConfig) -> Choice:
    """Choose boxes as the caffe tool: a proposal's confidence is its highest score among the classes that keep it.

    Those of at least ``threshold``, by falling confidence; at least ``least`` and at most ``most``. The boxes are the
    proposals, not the regressed ones.
    """
    scores = without_background(found.classes.softmax(-1), first=config.caffe)
    kept = suppress_classes(found.proposals, scores, CLASS_OVERLAP, config.extent)
    confidence = (scores * kept).amax(-1)
    rows = confidence.argsort(descending=True, stable=True)
    count = min(max(int((confidence >= threshold).sum()), least), most)
    rows = rows[:count]
    return Choice(rows, found.proposals[rows], confidence[rows], scores.argmax(-1)[rows])


def without_background(scores: Tensor, *, first: bool) -> Tensor:
    """Leave the background out of scores of classes ``[R, C + 1]``."""
    return scores[:, 1:] if first else scores[:, :-1]


def _sampled(pixels: Any, size: tuple[int, int], factors: tuple[float, float]) -> Tensor:
    """Resize bilinearly, reading only the four pixels around each sample: ``[3, H, W]``."""
    sides = []
    for axis in (0, 1):
        places = np.clip((np.arange(size[axis]) + 0.5) * factors[axis] - 0.5, 0, pixels.shape[axis] - 1)
        low = places.astype(np.int64)
        sides.append((low, np.minimum(low + 1, pixels.shape[axis] - 1), (places - low).astype(np.float32)))
    (top, bottom, down), (left, right, across) = sides

    def row(rows: Any) -> Any:
        lines = pixels[rows]
        return lines[:, left] * (1 - across[:, None]) + lines[:, right] * across[:, None]

    found = row(top) * (1 - down[:, None, None]) + row(bottom) * down[:, None, None]
    return torch.from_numpy(np.ascontiguousarray(found.transpose(2, 0, 1)))


def _is_paired(weights: Mapping[str, Tensor]) -> bool:
    """Return whether anchors have two scores, as in caffe, instead of one."""
    scores, deltas = (weights.get(f"proposal_generator.rpn_head.{name}.weight") for name in _SCORES)
    return scores is not None and deltas is not None and 2 * len(scores) == len(deltas)


_SCORES = ("objectness_logits", "anchor_deltas")


def _own_name(name: str) -> str:
    part = name.removeprefix(_PREDICTOR)
    for theirs, ours in _CAFFE_NAMES.items() if part != name else ():
        if part.startswith(theirs):
            return _PREDICTOR + ours + part.removeprefix(theirs)
    return name


def _hub_config(file: Path) -> dict[str, Any]:
    """Read the configuration beside published weights; its sections may lie within MODEL."""
    with reading(f"cannot read '{file}'", "mend or remove it", ConfigError):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping")
    model = values.get("MODEL")
    return {**(model if isinstance(model, dict) else {}), **values}
