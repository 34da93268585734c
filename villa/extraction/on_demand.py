"""Region features of images for a trained model, by the extractor that made those of its training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from villa.config.layers import take_text
from villa.config.options import build_options, dataclass_options
from villa.config.values import Origin, Value
from villa.datasets.own.grid import GridOptions
from villa.datasets.signatures import check_signatures
from villa.datasets.stores import RegionStore
from villa.errors import ConfigError, DataError, VillaError
from villa.extraction.base import Extractor, Regions
from villa.extraction.outputs import checked
from villa.files import refuse_addresses
from villa.registry import EXTRACTORS

_HELP = "give it (predict.extractor.name=... and its options), or make features by villa_extract and name their files"


def extractor_of(
    signature: str | None, maker: Mapping[str, Any] | None, given: Mapping[str, Any], device: torch.device
) -> Extractor:
    """Build the extractor of a model's training data.

    Args:
        signature: its signature; None if nobody noted it.
        maker: how it was built, as noted beside the features: ``name`` and options; None if unknown.
        given: name and options that the user gives, which win.
        device: where to compute.

    Raises:
        DataError: it is not known, cannot be built, or the one that was built makes other features.
    """
    noted = dict(maker or {})
    name = given.get("name", noted.get("name"))
    if name is None:
        known = "nobody noted which" if signature is None else f"by '{signature}', and nobody noted how it was built"
        raise DataError(f"the model reads features that an extractor made of images, {known}; {_HELP}")
    refuse_addresses(stored=_texts(noted), given=_texts(given))
    options = {**(noted if name == noted.get("name") else {}), **given}
    made = _build(str(name), {key: value for key, value in options.items() if key != "name"}, signature, device)
    check_signatures([("the training data", signature), (f"the extractor '{name}'", made.signature)])
    return made


def grid_extractor(options: GridOptions, device: torch.device) -> Extractor:
    """Return the extractor of the grid features that ``dataset.regions=grid`` reads."""
    values = {"grid": options.grid, "image_size": options.image_size, "background": options.background}
    return _build("efficientnet_grid", values, None, device)


class ExtractedStore(RegionStore):
    """The features of some images, just made.

    Args:
        regions: the regions of each image.
        half: whether training read them in 16 bits, which they had before.
    """

    def __init__(self, regions: Sequence[Regions], *, half: bool = False) -> None:
        super().__init__([])
        self._found = [_tensors(each, half=half) for each in regions]
        self.dim = self._found[0][0].shape[1]

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._found[index]

    def regions(self, index: int) -> int:
        """Return the number of regions of an image."""
        return len(self._found[index][0])

    def prepare(self, indices: Iterable[int]) -> None:
        """Do nothing: all are there."""


def _tensors(regions: Regions, *, half: bool) -> tuple[Tensor, Tensor]:
    """Return features and boxes as training read them: from a file, or (``half``) from the cache of grid features."""
    if half:
        return torch.from_numpy(regions.features.astype(np.float16)), torch.from_numpy(regions.boxes)
    arrays = checked(regions, "npz").arrays()
    return torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["norm_bb"]).float()


def _build(name: str, options: Mapping[str, Any], signature: str | None, device: torch.device) -> Extractor:
    origin = Origin("predict.extractor")
    values = {key: Value(value, origin, value if isinstance(value, str) else None) for key, value in options.items()}
    try:
        kind = EXTRACTORS.get(name)
        config = build_options(kind.Config, take_text(values, dataclass_options(kind.Config)), f"extractor '{name}'")
        made: Extractor = kind(config, device)
    except VillaError as error:
        if signature is None:
            raise
        raise DataError(
            f"the model reads the features of '{signature}', whose extractor cannot be built: {error} ({_HELP})"
        ) from error
    except ImportError as error:
        raise ConfigError(f"extractor '{name}' cannot be built: {error}; install what it needs") from error
    return made


def _texts(values: Mapping[str, Any]) -> list[str]:
    return [value for value in values.values() if isinstance(value, str)]
