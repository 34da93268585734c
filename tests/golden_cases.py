"""The golden cases: their names, and the models and batches that they are about.

``VILLA_GOLDEN=<folder>`` runs the tests on another folder with the same layout instead of ``tests/golden``.
"""

import io
import lzma
import os
from pathlib import Path
from typing import Any

import torch
from golden_utils import GOLDEN, build_model, to_batch, to_double

from villa.batch import Batch
from villa.models.base import DataFacts, Model
from villa.models.text_classifier import TextClassifier, TextClassifierConfig

FOLDER = Path(os.environ.get("VILLA_GOLDEN", GOLDEN))


def cases(prefix: str) -> list[tuple[str, str]]:
    """Folder and name of every case below the folders that start with ``prefix``."""
    files = sorted(FOLDER.glob(f"{prefix}*/case_*.pt*"))
    return [(file.parent.name, file.name.split(".pt")[0]) for file in files]


def load(folder: str, name: str) -> dict[str, Any]:
    """Load a file; a folder without it shares that of its task (``villa_vqa_detached``: ``villa_vqa``)."""
    shared = "_".join(folder.split("_")[:2])
    for place in (FOLDER / folder, FOLDER / shared):
        if (place / f"{name}.pt").exists():
            return torch.load(place / f"{name}.pt", weights_only=True)  # type: ignore[no-any-return]
        if (place / f"{name}.pt.xz").exists():
            with lzma.open(place / f"{name}.pt.xz") as file:
                return torch.load(io.BytesIO(file.read()), weights_only=True)  # type: ignore[no-any-return]
    raise FileNotFoundError(f"no {name} in {FOLDER / folder}")


def load_task(folder: str) -> tuple[Model, Batch]:
    """The tiny UNITER of a task and its batch, in the type of the folder's weights."""
    task: Any = folder.split("_")[1]
    model = build_model(load(folder, "model"), task)
    batch = to_batch(load(folder, "batch_forward")["batch"], task)
    if folder.endswith("_f64"):
        return model.double(), to_double(batch)
    return model, batch


def load_bert(folder: str) -> tuple[Model, Batch]:
    """The tiny BERT text classifier and its batch, cut to its longest text as the released loop does."""
    file = load(folder, "model_batch")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    options = {name: file["config"][name] for name in names}
    options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    facts = DataFacts(vocab_size=file["config"]["vocab_size"], num_labels=file["config"]["num_labels"])
    model = TextClassifier.from_config(TextClassifierConfig(architecture="bert", options=options), facts)
    model.transformer.load_state_dict(file["state_dict"])
    ids, mask, types, labels = file["batch"]
    length = int(mask.sum(1).max())
    batch = Batch(
        ids=[str(i) for i in range(len(ids))],
        input_ids=ids[:, :length],
        attention_mask=mask[:, :length].bool(),
        token_type_ids=types[:, :length],
        targets=labels,
    )
    return model, batch
