"""Box geometry and the mask embedding."""

import pytest
import torch

from villa.errors import DataError
from villa.facts import DataFacts
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.layers import ImageEmbeddings, box_geometry

CORNERS = torch.tensor([[0.1, 0.2, 0.5, 0.8]])


def test_corners_are_completed_by_sides_and_area() -> None:
    expected = torch.tensor([[0.1, 0.2, 0.5, 0.8, 0.4, 0.6, 0.24]])
    torch.testing.assert_close(box_geometry(CORNERS), expected)


def test_stored_sides_and_areas_are_kept() -> None:
    stored = torch.tensor([[0.1, 0.2, 0.5, 0.8, 0.3999, 0.6001]])
    assert torch.equal(box_geometry(stored), torch.cat((stored, stored[:, 4:5] * stored[:, 5:]), dim=1))
    complete = torch.rand(2, 3, 7)
    assert box_geometry(complete) is complete


def test_other_columns_are_an_error() -> None:
    with pytest.raises(DataError, match="boxes have 5 columns"):
        box_geometry(torch.zeros(2, 5))


def test_masked_regions_get_row_one_and_row_zero_never_acts() -> None:
    torch.manual_seed(0)
    sizes = UniterConfig(hidden_size=16, num_heads=2, hidden_dropout=0.0).sizes(DataFacts(9, 2, 8), types=2)
    embeddings = ImageEmbeddings(sizes)
    torch.nn.init.normal_(embeddings.mask_embedding.weight)
    before = embeddings.mask_embedding.weight.detach().clone()
    features, boxes, types = torch.randn(1, 3, 8), torch.rand(1, 3, 4), torch.zeros(1, 1, 16)
    masked = torch.tensor([[False, True, False]])
    plain = embeddings(features, boxes, types)
    shifted = features.clone()
    shifted[0, 1] += before[1]
    torch.testing.assert_close(embeddings(features, boxes, types, masked), embeddings(shifted, boxes, types))
    torch.testing.assert_close(embeddings(features, boxes, types, masked & False), plain)
    embeddings(features, boxes, types, masked).sum().backward()
    gradient = embeddings.mask_embedding.weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert torch.equal(embeddings.mask_embedding.weight, before)
