"""ViLT (arXiv 2102.03334) on transformers' modules: tokens and image patches in one transformer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.facts import DataFacts, PixelScale
from villa.models.attention import ExampleAttention, check_single, cut, grid_boxes, parts
from villa.models.base import ModelOutput, Point, layer_points, pixel_points
from villa.models.packing import Packing, PaddingFree, RowMask, Stream, attend_in_rows, run_layers
from villa.models.rows import given_mask
from villa.models.two_heads import OneStreamConfig, TwoHeadModel, score_mask
from villa.registry import register_model


@dataclass
class ViltConfig(OneStreamConfig):
    """Options of ViLT.

    Attributes:
        image_size: image side in pixels that the position embedding is made for; for images of other sizes it is
            interpolated.
        patch_size: side of a patch in pixels.
        max_positions: longest text in tokens.
        hidden_dropout: dropout after embeddings and linear maps; the release has none.
        attention_dropout: dropout of attention weights; the release has none.
    """

    name: str = "vilt"
    image_size: int = 384
    patch_size: int = 32
    max_positions: int = 40
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def check(self, *sizes: str) -> None:
        """Check that the options are consistent."""
        super().check("image_size", "patch_size", *sizes)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.image_size={self.image_size} is no multiple of patch_size={self.patch_size}: set "
                "model.image_size to one"
            )

    def transformer(self, facts: DataFacts) -> Any:
        """Return the transformers configuration.

        Raises:
            ConfigError: a number contradicts the data or is not known.
        """
        from transformers import ViltConfig as TransformerConfig

        return TransformerConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            modality_type_vocab_size=1 + self.images,  # text, and each image
            num_images=self.images,
            **self.shared_options(facts),
        )


@dataclass(frozen=True)
class Patches:
    """The patch maps of N images.

    Attributes:
        values: ``[N, width, h, w]``.
        mask: ``[N, h, w]`` bool, True on real patches, the upper left part of each map; None when all are real.
        sizes: height and width of the real part of each map; of all maps if they are real.
        texts: real tokens of the text of each image, if there is a mask.
    """

    values: Tensor
    mask: Tensor | None
    sizes: Sequence[tuple[int, int]]
    texts: Sequence[int] | None = None

    @classmethod
    def of(cls, values: Tensor, pixel_mask: Tensor | None, text_mask: Tensor) -> Patches:
        """Build from patches; one synchronisation reads all lengths.

        Args:
            values: ``[N, width, h, w]``.
            pixel_mask: ``[N, H, W]``, or None.
            text_mask: ``[N, T]`` bool, True on real tokens.
        """
        grid = values.shape[2], values.shape[3]
        if pixel_mask is None:
            return cls(values, None, [grid])
        mask = cls.real(pixel_mask, grid)
        parts = mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1), text_mask.sum(dim=1)
        rows, columns, texts = torch.stack(parts).tolist()
        return cls(values, mask, list(zip(rows, columns, strict=True)), texts)

    @property
    def lengths(self) -> Sequence[int] | None:
        """Real positions of every row: its text, the image's [CLS] and its patches; None without a mask."""
        if self.texts is None:
            return None
        return [text + 1 + height * width for text, (height, width) in zip(self.texts, self.sizes, strict=True)]

    @staticmethod
    def real(pixel_mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the patch mask, ``[N, h, w]`` bool: a patch is real if its first pixel is.

        Args:
            pixel_mask: ``[N, H, W]``, non-zero on real pixels.
            grid: h and w.
        """
        return F.interpolate(pixel_mask[:, None].float(), size=grid)[:, 0] > 0

    def placed(self, positions: Tensor, side: int) -> Tensor:
        """Add the position embedding, interpolated to the real part of each map.

        Args:
            positions: ``[1, side * side, width]``.
            side: patches per side that they are made for.

        Returns:
            ``[N, h * w, width]``.
        """
        square = positions.transpose(1, 2).reshape(1, -1, side, side)
        height, width = self.values.shape[2:]
        made = {size: _stretched(square, size, (height, width)) for size in dict.fromkeys(self.sizes)}
        added = torch.cat([made[size] for size in self.sizes])
        return (self.values + added).flatten(2).transpose(1, 2)

    def packed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Move the real patches of each map to the front, and cut off positions that are padding in all maps.

        Args:
            tokens: ``[N, h * w, width]``.

        Returns:
            ``[N, P, width]`` and their mask ``[N, P]``, or None when all are real.
        """
        if self.mask is None:
            return tokens, None
        real = self.mask.flatten(1)
        counts = [height * width for height, width in self.sizes]
        longest, shortest = max(counts), min(counts)
        if shortest == real.shape[1]:
            return tokens, None
        # A stable sort keeps the order of the patches.
        order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        kept = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return kept, None if shortest == longest else real.gather(1, order)


def _stretched(square: Tensor, size: tuple[int, int], whole: tuple[int, int]) -> Tensor:
    """Return positions ``[1, width, side, side]`` interpolated to ``size`` and zero-padded to ``whole``."""
    stretched = F.interpolate(square, size=size, mode="bilinear", align_corners=True)
    return F.pad(stretched, (0, whole[1] - size[1], 0, whole[0] - size[0]))


@register_model("vilt")
class Vilt(TwoHeadModel):
    """ViLT with an answer head, or the head for two images (NLVR2).

    Parameters have their names in transformers: those of ``ViltModel`` below ``vilt``, and the head's
    ``classifier.{0,1,3}``. Unlike in transformers, patches are not shuffled and padding is not drawn at random;
    neither changes the logits.

    Args:
        config: transformers configuration; ``num_images`` and ``num_labels`` determine the head.
        padding_free: see ``TwoHeadConfig``.
        pixel_scale: scale of the images' values, for perturbations of pixels; None if it is unknown.
    """

    Config = ViltConfig

    def __init__(self, config: Any, padding_free: PaddingFree = "auto", pixel_scale: PixelScale | None = None) -> None:
        super().__init__(padding_free)
        self.pixel_scale = pixel_scale
        from transformers import ViltModel

        self.images: int = config.num_images
        self.patch_size: int = config.patch_size
        self.vilt: Any = ViltModel(config)
        layers: Any = self.vilt.encoder.layer
        for layer in layers:
            attend_in_rows(layer.attention.attention, layer.layernorm_before)
        for table in (self.vilt.embeddings.cls_token, self.vilt.embeddings.position_embeddings):
            nn.init.normal_(table, std=config.initializer_range)  # transformers leaves them at 0
        read = config.hidden_size * self.images
        wide = read if self.images > 1 else 2 * read
        self.classifier = nn.Sequential(
            nn.Linear(read, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, config.num_labels)
        )
        self.classifier.apply(self._initialise)

    @classmethod
    def from_config(cls, config: ViltConfig, facts: DataFacts) -> Vilt:
        """Build the model with the configured head and fresh weights.

        Raises:
            ConfigError: the configuration contradicts the data or itself.
        """
        config.check()
        return cls(config.transformer(facts), config.padding_free, facts.pixels)

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score a batch of texts and images.

        Images are ``pixel_values`` ``[B, 3, H, W]``, or ``[B, 2, 3, H, W]`` for two images. ``pixel_mask`` of
        ``Batch.inputs``, ``[B, H, W]`` or ``[B, 2, H, W]``, is 1 on the real pixels, the upper left part; without it
        all pixels are real.

        Returns:
            Logits ``[B, labels]``; the pooled output ``[B * images, hidden]``; on request the states after the
            embedding and every layer, ``[B * images, T + 1 + P, hidden]`` (tokens, image [CLS], patches), and the
            attention maps of every layer.

        Raises:
            DataError: the batch lacks text or pixels, or they do not fit the model.
        """
        pixels = self._pixels(batch)
        texts, text_mask = self._texts(batch)
        words = given_mask(text_mask, texts[..., 0])
        patches = Patches.of(self.vilt.embeddings.patch_embeddings(pixels), self._pixel_mask(batch), words)
        seen, image_mask = self._embed_patches(patches)
        both = torch.cat((texts, seen), dim=1)
        mask = None
        if text_mask is not None or image_mask is not None:
            mask = torch.cat((words, given_mask(image_mask, seen[..., 0])), dim=1)
        (packing,) = self.packings(Stream(both, mask, patches.lengths), attentions=attentions)
        whole = hidden_states or attentions
        states, maps = run_layers(
            self.vilt.encoder.layer,
            packing.origin.collect(both),
            RowMask(score_mask(packing.mask, both), packing.blocks),
            None if whole else packing.first,
            attentions=attentions,
        )
        read = states[-1].index_select(0, packing.first) if whole else states[-1]
        pooled = self.vilt.pooler(self.vilt.layernorm(read.unsqueeze(1)))
        logits = self.classifier(pooled.reshape(len(batch), -1))
        layers = tuple(map(packing.origin.spread, states)) if hidden_states else ()
        return ModelOutput(logits, pooled, layers, tuple(maps))

    def attention_maps(self, batch: Batch) -> list[ExampleAttention]:
        """Return what every layer attends to in each example."""
        check_single(self.images, batch)
        output = self(batch, hidden_states=True, attentions=True)
        texts, seen = self._places(batch)
        found = []
        for row, (height, width) in enumerate(self._patch_sizes(batch)):
            text, around = texts[row].nonzero().flatten().cpu(), seen[row].nonzero().flatten().cpu()
            image = around[1:]  # without the image's own [CLS]
            maps = enumerate(output.attentions, start=1)
            layers = tuple(cut(f"layer {n}", layer[row], text, image, around=around) for n, layer in maps)
            states = parts(output.hidden_states, row, text, image)
            found.append(ExampleAttention(layers, text, grid_boxes(height, width), (height, width), states))
        return found

    def pretrained(self) -> Any:
        """Return the transformers model with the same head, sharing the parameters."""
        from transformers import ViltForImagesAndTextClassification, ViltForQuestionAnswering

        kind: Any = ViltForQuestionAnswering if self.images == 1 else ViltForImagesAndTextClassification
        with torch.device("meta"):
            whole = kind(copy.deepcopy(self.vilt.config))
        whole.vilt, whole.classifier = self.vilt, self.classifier
        return whole

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the looked-up word embedding (text) and the projected patches before positions are added (image)."""
        words, patches = "vilt.embeddings.text_embeddings.word_embeddings", "vilt.embeddings.patch_embeddings"
        return {
            "text": Point(words, "output", self._text_mask),
            "image": Point(patches, "output", self._patch_mask, layout="channels_first"),
        }

    def other_points(self) -> Mapping[str, Point]:
        """Return the pixels, if their scale is known, and the inputs of the layers at text and at the image."""
        layers = [f"vilt.encoder.layer.{number}" for number in range(self.vilt.config.num_hidden_layers)]
        masks = {"text": lambda batch: self._places(batch)[0], "image": lambda batch: self._places(batch)[1]}
        found = layer_points(layers, masks, blocks=lambda batch: self._packing(batch).origin)
        return {**pixel_points("vilt.embeddings.patch_embeddings", self._real_pixels, self.pixel_scale), **found}

    def _places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return where the text, and the image, is real in the sequence of both, ``[B * images, T + 1 + P]`` bool."""
        pixels = self._pixels(batch)
        assert batch.input_ids is not None
        words = self._repeated(batch.input_ids)
        text = given_mask(self._text_mask(batch), words)
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        patches = Patches.of(pixels.new_zeros(len(pixels), 1, *grid), self._pixel_mask(batch), text)
        kept, mask = patches.packed(patches.values.flatten(2).transpose(1, 2))
        seen = F.pad(given_mask(mask, kept[..., 0]), (1, 0), value=True)  # the image's own [CLS]
        return F.pad(text, (0, seen.shape[1])), F.pad(seen, (text.shape[1], 0))

    def _patch_sizes(self, batch: Batch) -> list[tuple[int, int]]:
        """Return rows and columns of the real patches of every image."""
        mask, pixels = self._pixel_mask(batch), self._pixels(batch)
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        if mask is None:
            return [grid] * len(pixels)
        real = Patches.real(mask, grid)
        return [(int(one[:, 0].sum()), int(one[0].sum())) for one in real]

    def _packing(self, batch: Batch) -> Packing:
        """Return the positions that layers compute, of tokens, image [CLS] and patches."""
        text, seen = self._places(batch)
        padded = self._text_mask(batch) is not None or self._pixel_mask(batch) is not None
        return self.packings(Stream(text, text | seen if padded else None), attentions=False)[0]

    def _real_pixels(self, batch: Batch) -> Tensor | None:
        """Return the pixel mask as ``[B * images, H * W]`` bool, or None."""
        mask = self._pixel_mask(batch)
        return None if mask is None else mask.flatten(1) > 0

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the classifier."""
        return ("classifier",)

    def _texts(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Embed the texts, repeated for each image: ``[B * images, T, hidden]``, and their mask."""
        if batch.input_ids is None or batch.input_ids.dim() != 2:
            raise DataError("ViLT reads one text an example; use another model for this data")
        longest, length = self.vilt.config.max_position_embeddings, batch.input_ids.shape[1]
        if length > longest:
            raise DataError(f"a text has {length} tokens, but the model has {longest} positions; cut texts to it")
        embeddings = self.vilt.embeddings
        types = None if batch.token_type_ids is None else self._repeated(batch.token_type_ids)
        words = embeddings.text_embeddings(self._repeated(batch.input_ids), token_type_ids=types)
        return words + embeddings.token_type_embeddings.weight[0], self._text_mask(batch)

    def _embed_patches(self, patches: Patches) -> tuple[Tensor, Tensor | None]:
        """Embed the image [CLS] and the patches: ``[B * images, 1 + P, hidden]``, and their mask."""
        embeddings = self.vilt.embeddings
        placed = patches.placed(embeddings.position_embeddings[:, 1:], self._grid())
        values, mask = patches.packed(placed)
        whole = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(len(values), -1, -1)
        both = embeddings.dropout(torch.cat((whole, values), dim=1))
        kinds = 1 + torch.arange(self.images, device=both.device).repeat(len(both) // self.images)
        if mask is not None:
            mask = torch.cat((mask.new_ones(len(mask), 1), mask), dim=1)
        return both + embeddings.token_type_embeddings(kinds)[:, None], mask

    def _grid(self) -> int:
        """Return the patches per side that the position embedding is made for."""
        side: int = self.vilt.config.image_size // self.patch_size
        return side

    def _pixels(self, batch: Batch) -> Tensor:
        """Return the images as ``[B * images, 3, H, W]``."""
        pixels = batch.pixel_values
        if pixels is None:
            raise DataError(
                "ViLT reads pixels, but the batch has none: set dataset.regions=pixels, or use another model"
            )
        images = pixels.shape[1] if pixels.dim() == 5 else 1
        if images != self.images:
            raise DataError(f"the head reads {self.images} image(s) an example, but the batch has {images}")
        height, width = pixels.shape[-2:]
        if min(height, width) < self.patch_size:
            raise DataError(
                f"an image of {height} x {width} pixels is smaller than a patch of {self.patch_size}: raise "
                "dataset.image_size"
            )
        return pixels.flatten(0, -4)

    def _patch_mask(self, batch: Batch) -> Tensor | None:
        """Return ``[B * images, h * w]`` bool, or None when all patches are real."""
        mask = self._pixel_mask(batch)
        if mask is None:
            return None
        grid = (mask.shape[-2] // self.patch_size, mask.shape[-1] // self.patch_size)
        return Patches.real(mask, grid).flatten(1)

    def _pixel_mask(self, batch: Batch) -> Tensor | None:
        """Return the pixel mask as ``[B * images, H, W]``, or None."""
        mask = (batch.inputs or {}).get("pixel_mask")
        return None if mask is None else mask.flatten(0, -3)

    def _text_mask(self, batch: Batch) -> Tensor | None:
        """Return the text mask as ``[B * images, T]`` bool, or None."""
        return None if batch.attention_mask is None else self._repeated(batch.attention_mask)

    def _repeated(self, texts: Tensor) -> Tensor:
        """Repeat ``[B, T]`` to ``[B * images, T]``."""
        return texts if self.images == 1 else texts.repeat_interleave(self.images, dim=0)

    def _initialise(self, module: nn.Module) -> None:
        """Initialise the head as the release does."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.vilt.config.initializer_range)
            nn.init.zeros_(module.bias)
