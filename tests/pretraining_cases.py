"""The golden cases of pre-training: their names, models and batches, and tiny batches of every objective."""

from typing import Any

import torch
from golden_utils import FOLDER, golden_config, golden_uniter, load
from torch import Tensor

from villa.batch import Batch
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter

#: Objective of the files whose names end so.
OBJECTIVES = {"mlm": "mlm", "mrfr": "mrfr", "mrckl": "mrc_kl", "mrc": "mrc", "itm": "itm_wra", "itm_noot": "itm"}


def objective_of(name: str) -> str | None:
    """The objective of a golden file, or None for other files."""
    return OBJECTIVES.get(name.removeprefix("qa_").removeprefix("qar_"))


def golden_names() -> list[tuple[str, str]]:
    """Folder and name of every golden case."""
    files = sorted(FOLDER.glob("pretrain*/*.pt*"))
    names = [(file.parent.name, file.name.split(".pt")[0]) for file in files]
    return [(folder, name) for folder, name in names if objective_of(name)]


def golden_model(folder: str) -> Uniter:
    """The tiny UNITER with all pre-training heads, with the released weights."""
    return golden_uniter("pretraining", load(folder, "model")["state_dict"])


def tiny_config(**changes: Any) -> UniterConfig:
    """The size of the golden model."""
    return golden_config("pretraining", **changes)


def golden_batch(golden: dict[str, Any], objective: str) -> Batch:
    """Turn a released batch into a ``Batch``."""
    ids, features = golden["input_ids"], golden["img_feat"]
    words = ids != 0
    regions = torch.arange(features.shape[1]) < (golden["attn_masks"].sum(1) - words.sum(1)).unsqueeze(1)
    asked: dict[str, Tensor] = {}
    if "txt_labels" in golden:
        masked = golden["txt_labels"] != -1
        asked = {"masked_tokens": masked, "targets": golden["txt_labels"][masked]}
    elif "img_masks" in golden:
        targets = golden["feat_targets"] if objective == "mrfr" else golden["label_targets"]
        asked = {"masked_regions": golden["img_masks"], "targets": targets}
    else:
        asked = {"targets": golden["targets"]}
    return Batch(
        ids=[str(i) for i in range(len(ids))],
        input_ids=ids,
        attention_mask=words,
        token_type_ids=golden.get("txt_type_ids"),
        features=features,
        boxes=golden["img_pos_feat"],
        region_mask=regions,
        objective=objective,
        **asked,
    )


def objective_batch(objective: str, *, words: int = 30, width: int = 6, classes: int = 5) -> Batch:
    """Three examples in double precision whose texts and images have different lengths, with something to ask each."""
    torch.manual_seed(1)
    text = torch.arange(6) < torch.tensor([[6], [4], [3]])
    regions = torch.arange(5) < torch.tensor([[5], [5], [2]])
    masked_tokens = torch.zeros_like(text)
    masked_tokens[[0, 0, 1, 2], [1, 4, 2, 1]] = True
    masked_regions = torch.zeros_like(regions)
    masked_regions[[0, 0, 1, 2], [0, 3, 4, 1]] = True
    features = torch.randn(3, 5, width, dtype=torch.float64) * regions.unsqueeze(-1)
    asked: dict[str, Any] = {"targets": torch.tensor([1, 0, 1])}
    if objective == "mlm":
        asked = {"masked_tokens": masked_tokens, "targets": torch.randint(1, words, (4,))}
    elif objective.startswith("mr"):
        rows = features[masked_regions] if objective == "mrfr" else torch.randn(4, classes).double().softmax(1)
        asked = {"masked_regions": masked_regions, "targets": rows}
        features = features.masked_fill(masked_regions.unsqueeze(-1), 0)
    return Batch(
        ids=["a", "b", "c"],
        input_ids=torch.randint(1, words, text.shape) * text,
        attention_mask=text,
        features=features,
        boxes=torch.rand(3, 5, 4, dtype=torch.float64) * regions.unsqueeze(-1),
        region_mask=regions,
        objective=objective,
        **asked,
    )
