"""Detectors of transformers as extractors: DETR and its relatives, RT-DETR, YOLOS, OWL-ViT and OWLv2."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image
from torch import Tensor, nn

from villa.checkpoints.transformers_folder import find_config, load_pretrained, quiet
from villa.errors import CheckpointError, ConfigError, DataError, one_line, reading
from villa.extraction.base import Extractor, ExtractorConfig, Regions, describe, hash_weights, parse_boxes
from villa.extraction.boxes import pool, suppress
from villa.files import sha256
from villa.registry import register_extractor
from villa.vetting import OF_PROCESSORS, vetted_source

#: Types whose classes are texts.
OPEN = ("owlvit", "owlv2")
#: Bins a side that a box is pooled to before they are averaged.
BINS = 7
#: Tokens of a text of OWL.
_TEXT = 16


@dataclass
class DetectorsConfig(ExtractorConfig):
    """Options of a detector of transformers.

    Attributes:
        model: folder, or name on the hub.
        boxes: boxes of an image, the surest: ``36``, ``10:100``, or ``10:100:0.2`` for those surer than 0.2.
        features: ``pooled``, of the backbone's last map within the box, or ``queries``, the decoder's vector of the
            box; ``auto`` pools if there is a map (YOLOS has none).
        overlap: intersection over union above which the less sure of two boxes is left out; 1 keeps all.
        classes: texts to look for, which OWL-ViT and OWLv2 need.
        soft_labels: whether to store the distribution of classes of every box, if the detector has one.
    """

    model: str = MISSING
    boxes: str = "36"
    features: Literal["auto", "pooled", "queries"] = "auto"
    overlap: float = 1.0
    classes: list[str] = field(default_factory=list)
    soft_labels: bool = True


class _Prepared(NamedTuple):
    """A preprocessed image: pixels ``[1, 3, H, W]``, and its height and width as it was."""

    pixels: Tensor
    size: tuple[int, int]


@register_extractor("transformers_detector")
class TransformersDetector(Extractor):
    """Boxes of a detector of transformers (DETR, RT-DETR, YOLOS, OWL), with features of its backbone or decoder."""

    Config = DetectorsConfig

    def __init__(self, config: DetectorsConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.selection = parse_boxes(config.boxes)
        if not 0 < config.overlap <= 1:
            raise ConfigError(f"overlap={config.overlap} is not within (0, 1]; 1 keeps all boxes")
        described = find_config(config.model, {}, "model")
        self._open = described.model_type in OPEN
        if self._open != bool(config.classes):
            raise ConfigError(
                f"classes are for {' and '.join(OPEN)}, which need them; '{config.model}' is of type "
                f"'{described.model_type}'"
            )
        self._network, _ = load_pretrained(self._kind(described), config.model, described)
        self._weights = hash_weights(self._network)
        self._labels: int = described.num_labels
        self._name = described.model_type
        self._network.eval().to(device)
        self._backbone = _backbone(self._network)
        maps = self._open or self._backbone is not None
        if config.features == "pooled" and not maps:
            raise ConfigError(f"'{config.model}' has no backbone with a map of features; give features=queries")
        self._pools = maps and config.features != "queries"
        self._processor, self._read_by = self._image_processor()

    @property
    def signature(self) -> str:
        """Weights, image processor, and the kind of features."""
        named = {"classes": ",".join(self.config.classes).replace(" ", "_")} if self._open else {}
        options = {"features": "pooled" if self._pools else "queries", "processor": self._read_by, **named}
        return describe(f"transformers/{self._name}", self._weights, options)

    def read(self, picture: Image.Image) -> _Prepared:
        """Prepare an image by the model's own processor."""
        try:
            made = self._processor(images=[picture], return_tensors="pt")
        except ImportError:  # of a package that no image could do without
            raise
        except Exception as error:  # processors raise all kinds for images of odd sizes
            raise DataError(f"the image processor of '{self.config.model}' fails: {one_line(error)}") from error
        return _Prepared(made["pixel_values"], (picture.height, picture.width))

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[_Prepared]) -> list[Regions]:
        """Detect image by image, because the padding of a batch would take part in the result."""
        return [self._detect(picture) for picture in pictures]

    def _detect(self, picture: _Prepared) -> Regions:
        pixels = picture.pixels.to(self.device)
        with _Maps(self._backbone) as maps:
            found = self._network(pixel_values=pixels, **self._texts)
        given, (height, width) = _corners(found.pred_boxes[0].float()), picture.size
        boxes = given
        if self._name == "owlv2":  # whose images are padded to a square
            boxes = boxes * max(height, width) / boxes.new_tensor([width, height] * 2)
        boxes = boxes.clamp(0, 1)
        scores, soft = self._scores(found.logits[0].float())
        sure, objects = scores.max(-1)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        rows = suppress(boxes, torch.where(inside, sure, -1), self.config.overlap)
        rows = rows[inside[rows]] if inside.any() else rows  # without those in the padding
        rows = rows[: self.selection.count(sure[rows].cpu().numpy())]
        features = self._features(found, maps.last, given[rows], rows)
        return Regions(
            picture.size,
            features.float().cpu().numpy(),
            boxes[rows].cpu().numpy(),
            sure[rows].cpu().numpy(),
            objects[rows].cpu().numpy().astype(np.int64),
            soft_labels=None if soft is None or not self.config.soft_labels else soft[rows].cpu().numpy(),
        )

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scores of classes ``[Q, C]``, and distributions with the background first if it is a class."""
        if logits.shape[-1] == self._labels + 1 and not self._open:
            probabilities = logits.softmax(-1)
            return probabilities[:, :-1], probabilities.roll(1, -1)
        return logits.sigmoid(), None

    def _features(self, found: Any, maps: Tensor | None, boxes: Tensor, rows: Tensor) -> Tensor:
        """Return the features of boxes ``[R, 4]``, divided by the size of the network's input, of queries ``rows``."""
        if not self._pools:
            vectors: Tensor = (found.class_embeds if self._open else found.last_hidden_state)[0][rows]
            return vectors
        if self._open:
            maps = found.image_embeds[0].permute(2, 0, 1)
        assert maps is not None
        cells = boxes.clamp(0, 1) * boxes.new_tensor([maps.shape[2], maps.shape[1]] * 2)
        return pool(maps.float(), cells, BINS, 1.0).mean((2, 3))

    def _kind(self, described: Any) -> Any:
        import transformers
        from transformers.models.auto import modeling_auto

        known = modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
        if not self._open and described.model_type not in known:
            raise ConfigError(
                f"'{self.config.model}' is of type '{described.model_type}', which is no detector; give one of "
                f"{', '.join([*known, *OPEN])}"
            )
        return (
            transformers.AutoModelForZeroShotObjectDetection if self._open else transformers.AutoModelForObjectDetection
        )

    def _image_processor(self) -> tuple[Any, str]:
        """Load the image processor, and hash its file."""
        from transformers import AutoImageProcessor

        auto: Any = AutoImageProcessor
        advice = "the folder needs the model's preprocessor_config.json"
        source = self.config.model
        with reading(f"the image processor of '{source}' cannot be loaded", advice, CheckpointError), quiet():
            folder = vetted_source(source, OF_PROCESSORS)
            processor = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return processor, sha256(folder / "preprocessor_config.json")[:8]

    @cached_property
    def _texts(self) -> dict[str, Tensor]:
        """The classes to look for as tokens."""
        if not self._open:
            return {}
        from transformers import AutoTokenizer

        source = self.config.model
        with reading(f"the tokenizer of '{source}' cannot be loaded", "give a whole folder", CheckpointError):
            folder = vetted_source(source, OF_PROCESSORS)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            made = tokenizer(
                list(self.config.classes), padding="max_length", max_length=_TEXT, truncation=True, return_tensors="pt"
            )
        return {name: made[name].to(self.device) for name in ("input_ids", "attention_mask")}


class _Maps:
    """Keeps the last feature map ``[D, H, W]`` that a network's backbone returns, as a context manager."""

    def __init__(self, backbone: nn.Module | None) -> None:
        self._backbone = backbone
        self.last: Tensor | None = None

    def __enter__(self) -> _Maps:
        if self._backbone is not None:
            self._handle = self._backbone.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._backbone is not None:
            self._handle.remove()

    def _keep(self, module: nn.Module, given: Any, returned: Any) -> None:
        self.last = returned.feature_maps[-1][0]


def _backbone(network: nn.Module) -> nn.Module | None:
    """Return the module of a detector that makes the feature maps, if it has one."""
    try:
        found: Any = importlib.import_module("transformers.backbone_utils")
    except ImportError:  # before transformers 5
        found = importlib.import_module("transformers.utils.backbone_utils")
    return next((module for module in network.modules() if isinstance(module, found.BackboneMixin)), None)


def _corners(boxes: Tensor) -> Tensor:
    """Return x1, y1, x2, y2 of centres, widths and heights ``[Q, 4]``."""
    half = boxes[:, 2:] / 2
    return torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], -1)
