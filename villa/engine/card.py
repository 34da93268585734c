"""The model card (``README.md``) of a saved folder: what the model is, how it was trained, what it scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from villa.checkpoints.transformers_folder import CONFIG_FILE
from villa.engine.setup import Parts

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
#: Longest list of labels that the card shows.
_SHOWN_LABELS = 20


@dataclass(frozen=True)
class Described:
    """The contents of a model card.

    Attributes:
        name: name of the model.
        parts: model, data and recipe.
        update: number of updates that the model was trained for.
        metrics: content of ``metrics.json``; empty if the model was not tested.
        provenance: software, ``data`` and ``seed``.
        labels: names of the classes, or None.
        reads_text: whether the folder holds a tokenizer or processor.
        place: where the model is loaded from: ``.``, or its name on the hub.
        base_model: name on the hub of the model that it was trained from, if known.
        license: the licence, as the hub calls it, if known.
        widget: an example for the model's page: ``text``, its model's answer as ``output``, and ``src`` of an image.
    """

    name: str
    parts: Parts
    update: int
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    labels: tuple[str, ...] | None
    reads_text: bool
    place: str = "."
    base_model: str | None = None
    license: str | None = None
    widget: Mapping[str, Any] | None = None

    @property
    def splits(self) -> dict[str, Mapping[str, Any]]:
        """Metrics by split."""
        return {name: values for name, values in self.metrics.items() if name != "protocol"}


def model_card(described: Described, folder: Path) -> str:
    """Return the text of the card.

    Args:
        described: contents of the card.
        folder: the saved folder, whose ``config.json`` says which class of transformers loads it.
    """
    from huggingface_hub import ModelCard

    architecture = (json.loads((folder / CONFIG_FILE).read_text()).get("architectures") or [None])[0]
    blocks = (_introduction, _training, _results, _provenance)
    front = f"---\n{_front_matter(described).to_yaml()}\n---"
    sections = [text for block in blocks if (text := "\n".join(block(described)))]
    return str(ModelCard("\n\n".join([front, *sections, "\n".join(_loading(described, architecture))]) + "\n"))


def _front_matter(described: Described) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    config, pipeline = described.parts.config, _pipeline(described)
    results = [
        EvalResult(pipeline or "other", "custom", config.dataset.name, name, value, dataset_split=split)
        for split, found in described.splits.items()
        for name, value in found.items()
    ]
    return ModelCardData(
        base_model=described.base_model,
        license=described.license,
        library_name="villa" if described.parts.model.pretrained() is None else "transformers",
        pipeline_tag=pipeline,
        tags=["villa", config.model.name, config.trainer.name],
        model_name=described.name if results else None,
        eval_results=results or None,
        widget=None if described.widget is None else [dict(described.widget)],
    )


def _pipeline(described: Described) -> str | None:
    """Return the hub's name for the task; matching, ranking and pre-training have none."""
    task = described.parts.data.facts().task
    if task == "generation":
        return "image-text-to-text"
    if task == "contrastive":
        return "zero-shot-image-classification"
    if described.labels is None:
        return None
    sees = "image" in described.parts.model.perturbation_points()
    return "visual-question-answering" if sees else "text-classification"


def _introduction(described: Described) -> Iterator[str]:
    config, model = described.parts.config, described.parts.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"# {_text(described.name)}"
    yield ""
    yield (
        f"A `{config.model.name}` model of {parameters / 1e6:.1f}M parameters, trained by villa with the method "
        f"`{config.trainer.name}` on the data set `{config.dataset.name}`."
    )
    if described.base_model is not None:
        yield ""
        yield f"It was trained from [{described.base_model}](https://huggingface.co/{described.base_model})."
    labels = described.labels
    if labels:
        shown = ", ".join(_code(label) for label in labels[:_SHOWN_LABELS])
        yield ""
        yield f"It has {len(labels)} labels: {shown}{', ...' if len(labels) > _SHOWN_LABELS else ''} (`labels.json`)."


def _training(described: Described) -> Iterator[str]:
    config = described.parts.config
    size = f"{config.batch.examples} examples" if config.batch.tokens is None else f"{config.batch.tokens} tokens"
    yield "## Training"
    yield ""
    yield f"{described.update:,} updates of {size}; the whole recipe is `villa/config.yaml`."
    yield ""
    yield from _table(("option", "value"), [("method", config.trainer.name), *_options("trainer", config.trainer)])
    yield ""
    rows = (("optimizer", config.optimizer), ("scheduler", config.scheduler), ("loss", config.loss))
    yield from _table(
        ("option", "value"), [row for name, part in rows for row in ((name, part.name), *_options(name, part))]
    )


def _options(section: str, config: Any) -> list[tuple[str, Any]]:
    return [(f"{section}.{name}", value) for name, value in asdict(config).items() if name != "name"]


def _results(described: Described) -> Iterator[str]:
    if not described.splits:
        return
    protocol = described.metrics.get("protocol", {})
    yield "## Results"
    yield ""
    rows = [(split, name, value) for split, values in described.splits.items() for name, value in values.items()]
    yield from _table(("split", "metric", "value"), rows)
    yield ""
    yield f"Of the {_text(protocol.get('checkpoint', 'given'))} checkpoint, that of update {described.update:,}."


def _provenance(described: Described) -> Iterator[str]:
    known = described.provenance
    if not known:
        return
    git, packages = known.get("git") or {}, known.get("packages") or {}
    revision = f"{git['revision']}{' (with changes)' if git.get('dirty') else ''}" if git.get("revision") else None
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    rows = [("fingerprint of the data", known.get("data")), ("seed", known.get("seed")), ("git revision", revision)]
    rows += [("Python", known.get("python")), ("packages", versions or None)]
    yield "## Provenance"
    yield ""
    yield from _table(("what", "value"), [row for row in rows if row[1] is not None])


def _loading(described: Described, architecture: str | None) -> Iterator[str]:
    yield "## Loading"
    yield ""
    place = described.place
    where = " (the folder's path in place of `.`)" if place == "." else ""
    yield f"With villa{where}, to predict, to test, or to train on:"
    yield ""
    yield f'```python\nimport villa\n\nmodel = villa.from_pretrained("{place}")\n```'
    yield ""
    yield f"```bash\nvilla_run run_type=test checkpoint.path={place}\n```"
    if isinstance(architecture, str) and architecture.isidentifier():
        reader = "AutoProcessor" if described.parts.data.facts().vocab_size is None else "AutoTokenizer"
        names = f"{architecture}, {reader}" if described.reads_text else architecture
        loads = (
            f'\n{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("{place}")'
            if described.reads_text
            else ""
        )
        yield ""
        yield "With transformers:"
        yield ""
        yield (
            f"```python\nfrom transformers import {names}\n\n"
            f'model = {architecture}.from_pretrained("{place}"){loads}\n```'
        )


def _table(heading: tuple[str, ...], rows: list[Any]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(_cell(value) for value in row)} |"


def _cell(value: Any) -> str:
    return _text(f"{value:.4g}" if isinstance(value, float) else "none" if value is None else value).replace("|", "\\|")


def _text(value: Any) -> str:
    """Return any text as a single line without markup (HTML, links or code)."""
    line = "".join(one if one.isprintable() else " " for one in str(value))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(").replace("`", "\\`")


def _code(value: Any) -> str:
    """Return any text as inline code, without backticks of its own."""
    return f"`{''.join(one if one.isprintable() and one != '`' else ' ' for one in str(value))}`"
