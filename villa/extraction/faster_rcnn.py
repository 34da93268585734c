"""The network of bottom-up attention: Faster R-CNN on ResNet's fourth stage, with classes and attributes of objects.

Its parameters have the names of ``unc-nlp/frcnn-vg-finetuned``; their shapes decide depth, widths and classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.errors import CheckpointError, ConfigError, one_line
from villa.extraction.boxes import cell_anchors, clip, grid_anchors, pool, regress, suppress

#: Regions that the last stage computes at a time, which bounds memory.
PART = 100


@dataclass(frozen=True)
class DetectorConfig:
    """What the shapes of the weights do not tell about a detector.

    Attributes:
        min_size: length in pixels that the short side of an image is resized to.
        max_size: length that the long side may have.
        mean: mean of blue, green and red, subtracted.
        std: what blue, green and red are divided by.
        valid_pool: whether the stem's pooling has no padding, as in caffe.
        anchor_sizes: sides of square anchors, if the weights come without anchors.
        anchor_ratios: ratios of height to width of anchors.
        anchor_offset: place of the anchors' centres in their cells, as a share of the stride.
        stride: pixels a cell of the feature map.
        proposals_before: best proposals before non-maximum suppression.
        proposals: most proposals after it.
        proposal_overlap: its threshold.
        proposal_weights: factors of the deltas of anchors.
        box_weights: factors of the deltas of proposals.
        pool_size: bins a side that proposals are pooled to.
        halve: whether the last stage halves the resolution, instead of widening its kernels.
        stride_in_1x1: whether a stage halves the resolution in its first 1 x 1 convolution, instead of the 3 x 3 one.
        caffe: caffe's conventions: a box includes its last pixel, the background is class 0, small proposals are
            dropped before they are sorted, and both sides are scaled by one factor.
        min_proposal: length that the sides of a proposal exceed, in pixels of the resized image (``caffe``: of the
            original).
    """

    min_size: int = 800
    max_size: int = 1333
    mean: tuple[float, ...] = (102.9801, 115.9465, 122.7717)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    valid_pool: bool = True
    anchor_sizes: tuple[float, ...] = (64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_offset: float = 0.0
    stride: int = 16
    proposals_before: int = 6000
    proposals: int = 300
    proposal_overlap: float = 0.7
    proposal_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    box_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    pool_size: int = 14
    halve: bool = False
    stride_in_1x1: bool = True
    caffe: bool = False
    min_proposal: float = 0.0

    @property
    def extent(self) -> float:
        """Pixels that a box is wider than x2 - x1."""
        return float(self.caffe)

    @classmethod
    def of_caffe(cls) -> Self:
        """Return the values of the original detector, with which the databases of UNITER and VILLA were made."""
        return cls(min_size=600, max_size=1000, box_weights=(1.0,) * 4, caffe=True, min_proposal=16.0)

    @classmethod
    def of_hub(cls, values: Mapping[str, Any]) -> Self:
        """Read the ``config.yaml`` of ``unc-nlp/frcnn-vg-finetuned``; what it does not name keeps its default.

        Raises:
            ConfigError: a value is not of the kind that is needed.
        """
        given: dict[str, Any] = {}
        for name, (section, key) in _HUB.items():
            value = values.get(section, {})
            value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                given[name] = _converted(value, f"{section}.{key}", getattr(cls, name))
        return cls(**given)


#: Where the hub's configuration has what.
_HUB = {
    "min_size": ("INPUT", "MIN_SIZE_TEST"),
    "max_size": ("INPUT", "MAX_SIZE_TEST"),
    "mean": ("MODEL", "PIXEL_MEAN"),
    "std": ("MODEL", "PIXEL_STD"),
    "valid_pool": ("MODEL", "MAX_POOL"),
    "anchor_sizes": ("ANCHOR_GENERATOR", "SIZES"),
    "anchor_ratios": ("ANCHOR_GENERATOR", "ASPECT_RATIOS"),
    "proposals_before": ("RPN", "PRE_NMS_TOPK_TEST"),
    "proposals": ("RPN", "POST_NMS_TOPK_TEST"),
    "proposal_overlap": ("RPN", "NMS_THRESH"),
    "proposal_weights": ("RPN", "BBOX_REG_WEIGHTS"),
    "box_weights": ("ROI_BOX_HEAD", "BBOX_REG_WEIGHTS"),
    "pool_size": ("ROI_BOX_HEAD", "POOLER_RESOLUTION"),
    "halve": ("ROI_BOX_HEAD", "RES5HALVE"),
    "stride_in_1x1": ("RESNETS", "STRIDE_IN_1X1"),
    "min_proposal": ("PROPOSAL_GENERATOR", "MIN_SIZE"),
    "anchor_offset": ("ANCHOR_GENERATOR", "OFFSET"),
}


def _converted(value: Any, name: str, default: Any) -> Any:
    """Return a value of the kind of its default."""
    try:
        if isinstance(default, tuple):
            inner = value[0] if len(value) == 1 and isinstance(value[0], list | tuple) else value
            return tuple(float(one) for one in inner)
        return type(default)(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the detector's configuration has {name} = {value!r:.60}; give numbers as published"
        ) from error


class Conv(nn.Conv2d):
    """A convolution without bias, followed by normalisation."""

    def __init__(
        self, ins: int, outs: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            ins, outs, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outs)

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve and normalise."""
        normalised: Tensor = self.norm(super().forward(maps))
        return normalised


class Bottleneck(nn.Module):
    """A residual block of three convolutions.

    Args:
        shapes: shapes of its parameters by name.
        strides: of the first and the second convolution.
        dilation: of the second.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], strides: tuple[int, int], dilation: int) -> None:
        super().__init__()
        outs, ins = shapes["conv1.weight"][:2]
        inner, grouped = shapes["conv2.weight"][:2]
        self.conv1 = Conv(ins, outs, 1, stride=strides[0])
        self.conv2 = Conv(outs, inner, 3, stride=strides[1], dilation=dilation, groups=outs // grouped)
        self.conv3 = Conv(inner, shapes["conv3.weight"][0], 1)
        stride, whole = strides[0] * strides[1], shapes["conv3.weight"][0]
        self.shortcut = Conv(ins, whole, 1, stride=stride) if "shortcut.weight" in shapes else None

    def forward(self, maps: Tensor) -> Tensor:
        """Add what the convolutions compute."""
        inner = self.conv3(F.relu(self.conv2(F.relu(self.conv1(maps)))))
        return F.relu(inner + (maps if self.shortcut is None else self.shortcut(maps)))


class Detection(NamedTuple):
    """What the network finds in an image; boxes in pixels of the resized image, P proposals, C classes.

    Attributes:
        proposals: ``[P, 4]``, best first.
        objectness: ``[P]`` logits of the proposals.
        features: ``[P, D]``.
        classes: ``[P, C + 1]`` logits; the background is last, or first with caffe's conventions.
        deltas: ``[P, C * 4]``, or ``[P, (C + 1) * 4]`` with caffe's conventions.
        attributes: ``[P, A + 1]`` logits, or None for weights without.
    """

    proposals: Tensor
    objectness: Tensor
    features: Tensor
    classes: Tensor
    deltas: Tensor
    attributes: Tensor | None


Shapes = Mapping[str, torch.Size]


class Backbone(nn.Module):
    """ResNet up to its fourth stage."""

    def __init__(self, shapes: Shapes, config: DetectorConfig) -> None:
        super().__init__()
        halving = (2, 1) if config.stride_in_1x1 else (1, 2)
        self.stem = nn.ModuleDict({"conv1": Conv(3, shapes["stem.conv1.weight"][0], 7, stride=2)})
        self.res2 = _stage(_below(shapes, "res2."), (1, 1))
        self.res3 = _stage(_below(shapes, "res3."), halving)
        self.res4 = _stage(_below(shapes, "res4."), halving)
        self._pool = nn.MaxPool2d(3, stride=2, padding=0 if config.valid_pool else 1, ceil_mode=config.valid_pool)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to ``[B, D, H / 16, W / 16]``."""
        maps: Tensor = self.res4(self.res3(self.res2(self._pool(F.relu(self.stem["conv1"](images))))))
        return maps


class ProposalHead(nn.Module):
    """Scores and deltas of the anchors of every cell."""

    def __init__(self, shapes: Shapes, *, pairs: bool) -> None:
        super().__init__()
        hidden, ins = shapes["conv.weight"][:2]
        anchors = shapes["anchor_deltas.weight"][0] // 4
        self.pairs = pairs
        self.conv = nn.Conv2d(ins, hidden, 3, padding=1)
        self.objectness_logits = nn.Conv2d(hidden, 2 * anchors if pairs else anchors, 1)
        self.anchor_deltas = nn.Conv2d(hidden, 4 * anchors, 1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``[B, H * W * A]`` and deltas ``[B, H * W * A, 4]`` for maps ``[B, D, H, W]``."""
        hidden = F.relu(self.conv(maps))
        scores = self.objectness_logits(hidden)
        if self.pairs:  # the background of all anchors, then the foreground of all
            scores = scores.unflatten(1, (2, -1)).softmax(1)[:, 1]
        deltas = self.anchor_deltas(hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
        return scores.permute(0, 2, 3, 1).flatten(1), deltas.flatten(1, 3)


class Predictor(nn.Module):
    """Classes, boxes and attributes of regions."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = (_linear(shapes, name) for name in ("cls_score", "bbox_pred"))
        self.attributes = "attr_score.weight" in shapes
        if self.attributes:
            self.cls_embedding = nn.Embedding(*shapes["cls_embedding.weight"])
            self.fc_attr, self.attr_score = (_linear(shapes, name) for name in ("fc_attr", "attr_score"))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return logits of classes, deltas, and logits of attributes for features ``[P, D]``; see ``Detection``."""
        classes, attributes = self.cls_score(features), None
        if self.attributes:
            named = self.cls_embedding(classes.argmax(-1))
            attributes = self.attr_score(F.relu(self.fc_attr(torch.cat([features, named], -1))))
        return classes, self.bbox_pred(features), attributes


class FasterRCNN(nn.Module):
    """The detector, in evaluation mode.

    Args:
        shapes: shapes of its parameters and buffers by name.
        config: the rest.

    Raises:
        CheckpointError: they are not those of such a detector.
    """

    def __init__(self, shapes: Shapes, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        strides = ((2, 1) if config.stride_in_1x1 else (1, 2)) if config.halve else (1, 1)
        heads = _below(shapes, "roi_heads.")
        cells = _Buffer(cell_anchors(config.anchor_sizes, config.anchor_ratios))
        try:
            self.backbone = Backbone(_below(shapes, "backbone."), config)
            head = ProposalHead(_below(shapes, "proposal_generator.rpn_head."), pairs=config.caffe)
            anchors = nn.ModuleDict({"cell_anchors": cells})
            self.proposal_generator = nn.ModuleDict({"anchor_generator": anchors, "rpn_head": head})
            last = _stage(_below(heads, "res5."), strides, dilation=1 if config.halve else 2)
            predictor = Predictor(_below(heads, "box_predictor."))
            self.roi_heads = nn.ModuleDict({"res5": last, "box_predictor": predictor})
        except (KeyError, ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"these are not the weights of a bottom-up-attention detector ({one_line(error)}); give those of "
                "unc-nlp/frcnn-vg-finetuned, or of a detector converted from caffe"
            ) from error
        self.eval()

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], scales: Sequence[float] | None = None
    ) -> list[Detection]:
        """Detect.

        Args:
            images: preprocessed images ``[B, 3, H, W]``. Padding takes part: an image has the same result in every
                batch only if it is given alone.
            sizes: height and width of every image without padding.
            scales: factor by which each was resized (for ``DetectorConfig.min_proposal``).
        """
        maps = self.backbone(images)
        scores, deltas = self.proposal_generator["rpn_head"](maps)
        cells = self.get_buffer("proposal_generator.anchor_generator.cell_anchors.0")
        anchors = grid_anchors(cells, maps.shape[2], maps.shape[3], self.config.stride, self.config.anchor_offset)
        found = []
        for place, size in enumerate(sizes):
            scale = 1.0 if scales is None else scales[place]
            proposals, objectness = self._propose(scores[place], deltas[place], anchors, size, scale)
            features = self._describe(maps[place], proposals)
            found.append(Detection(proposals, objectness, features, *self.roi_heads["box_predictor"](features)))
        return found

    def _describe(self, maps: Tensor, boxes: Tensor) -> Tensor:
        """Return the features ``[N, D]`` of boxes ``[N, 4]``."""
        size, scale = self.config.pool_size, 1 / self.config.stride
        parts = (pool(maps, part, size, scale) for part in torch.split(boxes, PART))
        return torch.cat([self.roi_heads["res5"](part).mean((2, 3)) for part in parts])

    def _propose(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the proposals ``[P, 4]`` of an image, best first, and their scores ``[P]``."""
        config = self.config
        if not config.caffe:
            scores, anchors, deltas = _best(config.proposals_before, scores, anchors, deltas)
        boxes = clip(regress(anchors, deltas, config.proposal_weights, config.extent), *size, config.extent)
        sides = boxes[:, 2:] - boxes[:, :2]
        least = config.min_proposal * (scale if config.caffe else 1)
        large = ((sides > 0) & (sides + config.extent > least)).all(-1)
        if not large.any():  # an image smaller than any proposal is one
            boxes, scores = boxes.new_tensor([[0, 0, size[1], size[0]]]) - config.extent / 2, scores.max()[None]
        else:
            scores, boxes = _best(config.proposals_before, scores[large], boxes[large])
        kept = suppress(boxes, scores, config.proposal_overlap, config.proposals, config.extent)
        return boxes[kept], scores[kept]


class _Buffer(nn.Module):
    """The anchors of the only feature map, under the name of the published weights."""

    def __init__(self, cells: Tensor) -> None:
        super().__init__()
        self.register_buffer("0", cells)


def _best(count: int, scores: Tensor, *others: Tensor) -> list[Tensor]:
    """Return the highest scores, and what belongs to them."""
    ordered, places = scores.sort(descending=True, stable=True)
    return [ordered[:count], *(other[places[:count]] for other in others)]


def _linear(shapes: Shapes, name: str) -> nn.Linear:
    outs, ins = shapes[f"{name}.weight"]
    return nn.Linear(ins, outs)


def _stage(shapes: Shapes, strides: tuple[int, int], dilation: int = 1) -> nn.Sequential:
    """Build the residual blocks of a stage, the first of which has the strides."""
    count = 1 + max(int(name.split(".")[0]) for name in shapes)
    blocks = (_below(shapes, f"{number}.") for number in range(count))
    plain = (1, 1)
    return nn.Sequential(
        *(Bottleneck(block, plain if number else strides, dilation) for number, block in enumerate(blocks))
    )


def _below(shapes: Shapes, prefix: str) -> dict[str, torch.Size]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
