"""The golden cases: their names, and the models and batches that they are about."""

from typing import Any

from golden_utils import FOLDER, build_model, load, to_batch, to_double

from villa.batch import Batch
from villa.facts import DataFacts
from villa.models.base import Model
from villa.models.text_classifier import TextClassifier, TextClassifierConfig


def cases(prefix: str) -> list[tuple[str, str]]:
    """Folder and name of every case below the folders that start with ``prefix``."""
    files = sorted(FOLDER.glob(f"{prefix}*/case_*.pt*"))
    return [(file.parent.name, file.name.split(".pt")[0]) for file in files]


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
