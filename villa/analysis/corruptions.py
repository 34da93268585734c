"""The 15 common corruptions of images (Hendrycks and Dietterich, ICLR 2019), by the package imagecorruptions-imaug."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from villa.analysis.shifts import Shift
from villa.datasets.base import Example
from villa.errors import DataError
from villa.registry import register_shift

#: Smallest height and width that can be corrupted.
_LEAST = 32


class Corruption(Shift):
    """A change of whole images as models with pixels get them, before they are scaled to numbers.

    Attributes:
        name: the corruption's name in the package.
    """

    modality: ClassVar[str] = "image"
    changes: ClassVar[str] = "whole images"
    requires: ClassVar[tuple[str, str]] = ("imagecorruptions", "corruptions")
    name: ClassVar[str]

    def fits(self, example: Example) -> bool:
        """Return whether an example has whole images."""
        return bool(example.images)

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Corrupt every image.

        Raises:
            DataError: an image is too small.
        """
        seeds = torch.randint(2**32, (len(example.images),), generator=draws).tolist()
        pairs = zip(example.images, seeds, strict=True)
        return replace(example, images=tuple(self._changed(image, severity, seed, example.id) for image, seed in pairs))

    def _changed(self, image: Any, severity: int, seed: int, id_: str) -> Any:
        """Return an image, ``[3, H, W]`` bytes or Pillow's, corrupted and of the same kind."""
        colours = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)
        height, width = colours.shape[:2]
        if min(height, width) < _LEAST:
            raise DataError(
                f"{self.name} needs images of {_LEAST} x {_LEAST} pixels or more, but one of example '{id_}' has "
                f"{width} x {height}; leave robustness.shifts={self.name} out"
            )
        found = _corrupted(self.name, colours, severity, seed)
        return torch.from_numpy(found).permute(2, 0, 1) if isinstance(image, Tensor) else Image.fromarray(found)


def _corrupted(name: str, colours: npt.NDArray[np.uint8], severity: int, seed: int) -> npt.NDArray[np.uint8]:
    """Corrupt ``[H, W, 3]`` bytes with draws that depend on the seed alone; numpy's own state stays as it was."""
    import imagecorruptions

    own = inspect.signature(imagecorruptions.corruption_dict[name]).parameters
    given = {"seed": seed} if "seed" in own else {}  # the others draw from numpy's state
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        found: npt.NDArray[np.uint8] = np.array(imagecorruptions.corrupt(colours, severity, name, **given))
    finally:
        np.random.set_state(before)
    return found


@register_shift("gaussian_noise")
class GaussianNoise(Corruption):
    """Normal noise on every channel, as in low light."""

    name = "gaussian_noise"


@register_shift("shot_noise")
class ShotNoise(Corruption):
    """Poisson noise, as of single photons."""

    name = "shot_noise"


@register_shift("impulse_noise")
class ImpulseNoise(Corruption):
    """Salt and pepper: single channels of pixels become black or white."""

    name = "impulse_noise"


@register_shift("defocus_blur")
class DefocusBlur(Corruption):
    """A picture that is out of focus."""

    name = "defocus_blur"


@register_shift("glass_blur")
class GlassBlur(Corruption):
    """Pixels swap places locally, as behind frosted glass."""

    name = "glass_blur"


@register_shift("motion_blur")
class MotionBlur(Corruption):
    """A camera that moved along a line."""

    name = "motion_blur"


@register_shift("zoom_blur")
class ZoomBlur(Corruption):
    """A camera that moved towards the scene."""

    name = "zoom_blur"


@register_shift("snow")
class Snow(Corruption):
    """Flakes that fall."""

    name = "snow"


@register_shift("frost")
class Frost(Corruption):
    """Crystals on the lens."""

    name = "frost"


@register_shift("fog")
class Fog(Corruption):
    """Clouds of a fractal that lie over the scene."""

    name = "fog"


@register_shift("brightness")
class Brightness(Corruption):
    """More light."""

    name = "brightness"


@register_shift("contrast")
class Contrast(Corruption):
    """Less contrast."""

    name = "contrast"


@register_shift("elastic_transform")
class ElasticTransform(Corruption):
    """Small regions that are stretched or compressed."""

    name = "elastic_transform"


@register_shift("pixelate")
class Pixelate(Corruption):
    """Fewer pixels, scaled up."""

    name = "pixelate"


@register_shift("jpeg_compression")
class JpegCompression(Corruption):
    """Artefacts of strong JPEG compression."""

    name = "jpeg_compression"
