"""Golden tensors of the released code: loading, their batches as ``Batch``, and the tiny UNITER that they are of.

``tests/golden/README.md`` says what the files hold. ``VILLA_GOLDEN=<folder>`` runs the tests on another folder with the
same layout instead of ``tests/golden``.
"""

from __future__ import annotations

import io
import lzma
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from villa.batch import Batch
from villa.facts import DataFacts
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter

GOLDEN = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("VILLA_GOLDEN", GOLDEN))

Task = Literal["vqa", "ve", "nlvr2", "vcr"]
HEADS: dict[str, str] = {
    "vqa": "classification",
    "ve": "classification",
    "nlvr2": "nlvr2_paired_attn",
    "vcr": "multiple_choice",
}


def load(folder: str, name: str) -> Any:
    """Load a file: a dictionary of tensors, numbers, strings and lists.

    A folder without it shares that of its task (``villa_vqa_detached``: ``villa_vqa``).
    """
    shared = "_".join(folder.split("_")[:2])
    for place in (FOLDER / folder, FOLDER / shared):
        if (place / f"{name}.pt").exists():
            return torch.load(place / f"{name}.pt", weights_only=True)
        if (place / f"{name}.pt.xz").exists():
            with lzma.open(place / f"{name}.pt.xz") as file:
                return torch.load(io.BytesIO(file.read()), weights_only=True)
    raise FileNotFoundError(f"no {name} in {FOLDER / folder}")


def to_batch(golden: dict[str, Any], task: Task) -> Batch:
    """Turn a released batch (without ``gather_index``) into a ``Batch``.

    NLVR2's interleaved rows become ``[B, 2, R, D]`` images, VCR's four rows an example ``[B, 4, T]`` texts.
    """
    input_ids, features = golden["input_ids"], golden["img_feat"]
    text_mask = input_ids != 0
    region_counts = golden["attn_masks"].sum(1) - text_mask.sum(1)
    region_mask = torch.arange(features.shape[1]) < region_counts.unsqueeze(1)
    types, targets = golden.get("txt_type_ids"), golden["targets"]
    group = {"nlvr2": 2, "vcr": 4}.get(task, 1)

    def texts(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 4)) if task == "vcr" else tensor[::group]

    def images(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 2)) if task == "nlvr2" else tensor[::group]

    return Batch(
        ids=[str(i) for i in range(len(input_ids) // group)],
        input_ids=texts(input_ids),
        attention_mask=texts(text_mask),
        token_type_ids=None if types is None else texts(types),
        features=images(features),
        boxes=images(golden["img_pos_feat"]),
        region_mask=images(region_mask),
        targets=targets.view(-1, 4) if task == "vcr" else targets,
    )


def to_double(batch: Batch) -> Batch:
    """The batch with its floating tensors in float64."""
    return batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def golden_config(head: str, **changes: Any) -> UniterConfig:
    """The options of the tiny UNITER."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "max_positions": 128}
    return UniterConfig(head=head, **{**sizes, "hidden_dropout": 0.0, "attention_dropout": 0.0, **changes})


def golden_uniter(head: str, weights: dict[str, Tensor]) -> Uniter:
    """The tiny UNITER with golden weights, in training mode."""
    rows = {name: len(value) for name, value in weights.items()}
    labels = [rows[name] for name in ("vqa_output.3.bias", "region_classifier.net.3.bias") if name in rows]
    facts = DataFacts(
        vocab_size=rows["uniter.embeddings.word_embeddings.weight"],
        num_labels=labels[0] if labels else None,
        feature_dim=weights["uniter.img_embeddings.img_linear.weight"].shape[1],
    )
    types = rows["uniter.embeddings.token_type_embeddings.weight"]
    model = Uniter.from_config(golden_config(head, type_vocab_size=types), facts)
    model.load_state_dict(weights)
    return model


def build_model(file: dict[str, Any], task: Task) -> Uniter:
    """The tiny UNITER of a task's golden ``model`` file."""
    return golden_uniter(HEADS[task], file["state_dict"])
