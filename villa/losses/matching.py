"""What image-text matching gains from the alignment of words and regions."""

from __future__ import annotations

from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.losses.classification import class_indices
from villa.models.base import ModelOutput


def alignment(output: ModelOutput, batch: Batch) -> Tensor:
    """WRA: transport distances of right pairs less those of wrong ones, divided by all B pairs.

    Raises:
        DataError: the model gives no distance.
    """
    distance = output.extras.get("transport")
    if distance is None:
        raise DataError("objective 'itm_wra' needs a model that aligns words and regions; use 'itm' with this one")
    signs = 2 * class_indices(batch, distance) - 1
    return (signs * distance).sum() / len(distance)
