"""The base of models that wrap one transformers model: loading and saving, label names and attention maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from villa.checkpoints.load_report import LoadReport
from villa.checkpoints.transformers_folder import ASSETS, is_transformers_folder, load_pretrained, stored_config
from villa.errors import CheckpointError
from villa.facts import DataFacts, RowKind
from villa.files import from_home
from villa.models.base import Model
from villa.models.matching import Matching, rows_of
from villa.models.two_heads import settle

#: Suffixes of configuration options that are token ids.
_IDS = ("_token_id", "_token_index")


def load_matched(
    transformer: Any, source: str, matching: Matching | None, rows: Callable[[Any], Mapping[str, RowKind]]
) -> tuple[Any, LoadReport]:
    """Load a model that transformers has saved, with its rows in the data's order.

    Args:
        transformer: the model as built for the data.
        source: a folder, or a name on the hub.
        matching: matches rows by name; None keeps their order.
        rows: returns the parameters of a model whose rows stand for word-pieces or labels.

    Returns:
        The model in training mode, and what was loaded.

    Raises:
        CheckpointError: see ``load_pretrained``; or the model counts positions from another padding id than the data's.
    """
    kind, config = type(transformer), transformer.config
    moved = set() if matching is None else _mismatched_rows(config, source, matching)
    if matching is None or not moved:
        loaded, report = load_pretrained(kind, source, config)
        return loaded, _with_row_notes(loaded, loaded, report, matching, rows)
    loaded, report = load_pretrained(kind, source, _as_saved(config, source, moved))
    config = copy.deepcopy(config)
    if "tokens" in moved:
        _settle_ids(config, loaded, matching)
    made = kind._from_config(config, dtype=torch.float32)
    report = _with_row_notes(loaded, made, report, matching, rows)
    weights = {name: value for name, value in loaded.state_dict().items() if name not in report.missing}
    matching.place(weights, made.state_dict(), rows(made))
    made.load_state_dict(weights, strict=False)
    if getattr(loaded, "generation_config", None) is not None:
        made.generation_config = loaded.generation_config
    fresh = tuple(name for name in report.loaded if name not in weights)
    kept = tuple(name for name in report.loaded if name in weights)
    return made.train(), replace(report, loaded=kept, missing=(*report.missing, *fresh))


def word_modules(transformer: Any) -> list[nn.Module]:
    """Return the word embeddings and decoders of a transformers model and of the models inside it."""
    found = _reported_words(transformer)
    if not any(isinstance(module, nn.Embedding) for module in found):
        size = getattr(transformer.config.get_text_config(), "vocab_size", None)
        tables = (module for module in transformer.modules() if isinstance(module, nn.Embedding))
        found += [table for table in tables if table.num_embeddings == size][:1]
    sizes = {module.num_embeddings for module in found if isinstance(module, nn.Embedding)}
    inner = (module for module in transformer.modules() if hasattr(module, "get_input_embeddings"))
    more = (module for model in inner for module in _reported_words(model))
    found += [module for module in more if isinstance(module, nn.Embedding | nn.Linear) and len(module.weight) in sizes]
    return list({id(module): module for module in found}.values())


def layer_names(module: nn.Module, prefix: str = "") -> list[str]:
    """Return the dotted paths of a module's layers: of the items of its only list of modules, else none.

    Args:
        module: the module.
        prefix: dotted path of the module itself.
    """
    lists = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        return []
    start = f"{prefix}.{outer[0]}" if prefix else outer[0]
    return [f"{start}.{number}" for number in range(len(lists[outer[0]]))]


def _reported_words(model: Any) -> list[nn.Module]:
    """Return the word embedding and the decoder that a transformers model reports, if any."""
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, method)())
        except (AttributeError, NotImplementedError):
            continue
    return [module for module in found if isinstance(module, nn.Module)]


def _mismatched_rows(config: Any, source: str, matching: Matching) -> set[RowKind]:
    """Return the kinds of rows to match: those whose names or number differ from the data's."""
    moved: set[RowKind] = {kind for kind in ("tokens", "labels") if matching.moves(kind)}
    if matching.names("tokens"):
        theirs, ours = (getattr(one.get_text_config(), "vocab_size", None) for one in (stored_config(source), config))
        moved |= {"tokens"} if theirs != ours else set()
    return moved


def _with_row_notes(
    loaded: Any,
    made: Any,
    report: LoadReport,
    matching: Matching | None,
    rows: Callable[[Any], Mapping[str, RowKind]],
) -> LoadReport:
    """Add to a report how the rows of a loaded model are matched to those of the model built for the data."""
    if matching is None:
        return report
    values = loaded.state_dict()
    given = {name: values[name] for name in report.loaded}
    return replace(report, rows=matching.notes(given, made.state_dict(), rows(made)))


def _as_saved(config: Any, source: str, moved: set[RowKind]) -> Any:
    """Return the configuration with the saved numbers of word-pieces and labels, and the saved special tokens."""
    saved, own = stored_config(source), copy.deepcopy(config)
    if "labels" in moved:
        own.id2label, own.label2id = saved.id2label, saved.label2id
        if hasattr(own, "num_qa_labels"):  # LXMERT
            own.num_qa_labels = saved.num_qa_labels
    if "tokens" in moved:
        for ours, theirs in zip(_parts(own), _parts(saved), strict=False):
            for name, value in theirs.to_dict().items():
                if name == "vocab_size" or name.endswith(_IDS):
                    setattr(ours, name, value)
    return own


def _settle_ids(config: Any, loaded: Any, matching: Matching) -> None:
    """Set a configuration's special-token ids and vocabulary size to those of the data."""
    theirs, ours = matching.given.tokens or (), matching.wanted.tokens or ()
    places = {token: place for place, token in enumerate(ours) if token is not None}

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [moved(name, one) for one in value]
        token = theirs[value] if isinstance(value, int) and 0 <= value < len(theirs) else None
        usual = matching.wanted.padding if name == "pad_token_id" else None
        return value if token is None else places.get(token, value if usual is None else usual)

    for part, saved in zip(_parts(config), _parts(loaded.config), strict=False):
        for name, value in saved.to_dict().items():
            if name.endswith(_IDS) and value is not None:
                setattr(part, name, moved(name, value))
    text = config.get_text_config()
    if getattr(text, "vocab_size", len(ours)) < len(ours):
        text.vocab_size = len(ours)
    _check_positions(loaded, getattr(text, "pad_token_id", None), matching)


def _check_positions(loaded: Any, padding: int | None, matching: Matching) -> None:
    """Refuse a change of the padding id if positions are counted from it (RoBERTa)."""
    before = getattr(loaded.config.get_text_config(), "pad_token_id", None)
    tables = (m for name, m in loaded.named_modules() if name.endswith("position_embeddings"))
    if before != padding and any(getattr(table, "padding_idx", None) is not None for table in tables):
        raise CheckpointError(
            f"'{matching.source}' counts positions from its padding, word-piece {before}, but the data's is {padding}: "
            "read them by the tokenizer of the checkpoint"
        )


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and, if nested, its text configuration."""
    yield config
    text = config.get_text_config()
    if text is not config:
        yield text


class TransformersModel(Model):
    """Base of models that wrap one transformers model, perhaps with an additional head.

    Attributes:
        transformer: the transformers model.
    """

    transformer: Any

    def save_assets(self, folder: Path) -> None:
        """Write the transformers configuration, since the folder that it came from may not last."""
        self.transformer.config.save_pretrained(folder / ASSETS)

    def named_rows(self) -> Mapping[str, RowKind]:
        """Return the word embeddings and decoders that the transformer reports, and the last layer of the head."""
        return rows_of(self, word_modules(self.transformer), self.head_prefixes())

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load weights that transformers saved (a folder, or a name on the hub), or those of a file or run.

        Raises:
            CheckpointError: they cannot be read or belong to another model.
        """
        path = from_home(source)
        if path.exists() and not is_transformers_folder(path):
            return super().load_weights(source, matching)
        heads = [prefix.removeprefix("transformer.") for prefix in self.head_prefixes()]
        self.transformer, report = load_matched(
            self.transformer, source, matching, lambda made: rows_of(made, word_modules(made), heads)
        )
        return report

    @contextmanager
    def _maps(self, wanted: bool) -> Iterator[None]:
        """Switch to an attention implementation that returns maps, which the fused kernels do not."""
        usual = self.transformer.config._attn_implementation
        if wanted:
            self.transformer.set_attn_implementation("eager")
        try:
            yield
        finally:
            if wanted:
                self.transformer.set_attn_implementation(usual)


def name_labels(described: Any, num_labels: int | None, facts: DataFacts) -> None:
    """Set the number of classes of a transformers configuration, and their names if they have any.

    Args:
        described: the configuration object.
        num_labels: number of classes that the recipe gives, or None.
        facts: facts of the data.

    Raises:
        ConfigError: recipe and data contradict each other, or neither gives the number.
    """
    described.num_labels = settle("model.num_labels", num_labels, facts.num_labels)
    if facts.labels is not None:
        described.id2label = dict(enumerate(facts.labels))
        described.label2id = {label: number for number, label in enumerate(facts.labels)}
