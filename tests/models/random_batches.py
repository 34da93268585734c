"""Random batches for the tiny UNITER of ``conftest.py``."""

import torch

from villa.batch import Batch


def random_batch(
    texts: tuple[int, ...] = (3, 7),
    images: tuple[int, ...] = (3, 5),
    *,
    columns: int = 4,
    padded: bool = True,
    objective: str | None = None,
) -> Batch:
    """Random texts ``[*texts]`` and regions ``[*images, 8]``; ``padded`` pads the first example by one each."""
    torch.manual_seed(1)
    text_mask, region_mask = torch.ones(texts, dtype=torch.bool), torch.ones(images, dtype=torch.bool)
    if padded:
        text_mask[0, ..., -1] = False
        region_mask[0, ..., -1] = False
    return Batch(
        ids=[str(i) for i in range(texts[0])],
        input_ids=torch.randint(1, 50, texts),
        attention_mask=text_mask,
        features=torch.randn(*images, 8),
        boxes=torch.rand(*images, columns),
        region_mask=region_mask,
        objective=objective,
    )
