"""Golden tensors of the released code: loading, and their batches as ``Batch``.

``tests/golden/README.md`` says what the files hold.
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from villa.batch import Batch
from villa.models.base import DataFacts
from villa.models.uniter import Uniter
from villa.models.uniter_config import UniterConfig

GOLDEN = Path(__file__).parent / "golden"

Task = Literal["vqa", "ve", "nlvr2", "vcr"]
HEADS: dict[str, str] = {
    "vqa": "classification",
    "ve": "classification",
    "nlvr2": "nlvr2_paired_attn",
    "vcr": "multiple_choice",
}


def load(case_dir: str, name: str) -> Any:
    """Load ``tests/golden/<case_dir>/<name>.pt.xz``: a dictionary of tensors, numbers, strings and lists."""
    with lzma.open(GOLDEN / case_dir / f"{name}.pt.xz") as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


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


def build_model(model_file: dict[str, Any], task: Task) -> Uniter:
    """The tiny UNITER of a golden ``model`` file, with its weights, in training mode (its dropout is 0)."""
    released, weights = model_file["config"], model_file["state_dict"]
    config = UniterConfig(
        head=HEADS[task],
        hidden_size=released["hidden_size"],
        num_layers=released["num_hidden_layers"],
        num_heads=released["num_attention_heads"],
        intermediate_size=released["intermediate_size"],
        max_positions=released["max_position_embeddings"],
        hidden_dropout=released["hidden_dropout_prob"],
        attention_dropout=released["attention_probs_dropout_prob"],
    )
    facts = DataFacts(
        vocab_size=len(weights["uniter.embeddings.word_embeddings.weight"]),
        num_labels=len(weights["vqa_output.3.bias"]) if "vqa_output.3.bias" in weights else None,
        feature_dim=model_file["img_dim"],
    )
    model = Uniter.from_config(config, facts)
    model.load_state_dict(weights)
    return model
