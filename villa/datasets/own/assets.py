"""Assets of a question-answering checkpoint: tokenizer or processor, answers, and the kind of regions."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from villa.checkpoints.layout import ASSETS, OWN
from villa.checkpoints.transformers_folder import is_hub_name, is_transformers_folder, stored_config
from villa.checkpoints.weight_files import FOLDER_FILES
from villa.datasets.names import CENTRED, image_reading, pixel_reading, pixel_scale, text_facts
from villa.datasets.own.processors import load_processor, save_processor
from villa.datasets.own.readers import Kind
from villa.datasets.own.records import REGION_FIELDS, Regions
from villa.datasets.signatures import extractor_reading, is_maker, is_signature
from villa.datasets.stores import STATISTICS_FILE, scaled_reading
from villa.datasets.text import TOKENIZER_FILE, load_tokenizer, save_tokenizer, vocabulary_size
from villa.errors import DataError, VillaError, reading
from villa.facts import DataFacts, PixelScale, Task
from villa.files import from_home, sha256, write_json
from villa.json_values import is_count, read_own

ANSWERS_FILE, META_FILE, PROCESSOR = "answers.json", "dataset.json", "processor"

#: Task of the model by kind of target.
_TASKS: dict[Any, Task] = {"label": "classification", "text": "generation", "pair": "contrastive"}


@dataclass(frozen=True)
class Assets:
    """Vocabulary and labels of a data set.

    Attributes:
        tokenizer: the tokenizer; None if a model's own processor reads the text.
        answers: label names in the order of the logits; empty without labels.
        soft: whether targets are scores of all answers instead of one class.
        regions: source of the region features.
        feature_dim: width of the region features; None for text only.
        extractor: signature of the extractor (network, version, weights, sizes); None if unknown, or without regions.
        maker: how the extractor was built: its registered ``name`` and options; None if unknown.
        kind: kind of target: a ``label``, a ``text`` to generate, or a matching ``pair`` of image and text.
        processor: the model's own transformers processor, or None.
    """

    tokenizer: Tokenizer | None
    answers: list[str]
    soft: bool
    regions: Regions
    feature_dim: int | None = None
    extractor: str | None = None
    maker: dict[str, Any] | None = None
    kind: Kind = "label"
    processor: Any = None

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label of every answer."""
        return {answer: label for label, answer in enumerate(self.answers)}

    def facts(self) -> DataFacts:
        """Return the sizes and names that the data fixes for a model."""
        words = None if self.tokenizer is None else vocabulary_size(self.tokenizer)
        labels = tuple(self.answers) if self.kind == "label" else None
        texts = self._texts
        return DataFacts(
            words,
            len(labels) if labels else None,
            self.feature_dim,
            _TASKS[self.kind],
            labels,
            tokens=texts["tokens"],
            padding=texts["padding"],
            reading={**texts["reading"], **self._images()},
            pixels=self._pixels(),
        )

    @cached_property
    def _texts(self) -> dict[str, Any]:
        return text_facts(self.tokenizer if self.tokenizer is not None else self.processor)

    def _pixels(self) -> PixelScale | None:
        """Return the scale of the images that a batch has."""
        if self.processor is not None:
            return pixel_scale(self.processor)
        return CENTRED if self.regions == "pixels" else None

    def _images(self) -> dict[str, str]:
        """Return how images are read, as far as weights depend on it."""
        if self.regions == "none":
            return {}
        found: dict[str, str] = {"regions": self.regions}
        if self.processor is not None:
            return found | image_reading(self.processor)
        found |= extractor_reading(self.extractor)
        side = re.search(r"images of (\d+) pixels", self.extractor or "")
        return found if side is None else found | pixel_reading(int(side[1]))

    def reading_fingerprint(self) -> str:
        """Hash of the readers of texts and images."""
        if self.tokenizer is not None:
            plain = Tokenizer.from_str(self.tokenizer.to_str())
            plain.no_truncation()  # set by the last text read; truncation is an option of the data set
            return str(plain.to_str())
        with tempfile.TemporaryDirectory() as folder:
            save_processor(self.processor, Path(folder))
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return json.dumps([[str(path.relative_to(folder)), sha256(path)] for path in files])

    def save(self, folder: Path) -> None:
        """Write the tokenizer or processor, ``answers.json`` and ``dataset.json`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)
        if self.processor is not None:
            save_processor(self.processor, folder / PROCESSOR)
        write_json(folder / ANSWERS_FILE, self.answers)
        names = ("soft", "regions", "feature_dim", "extractor", "kind")
        made = {} if self.maker is None else {"maker": self.maker}
        write_json(folder / META_FILE, {name: getattr(self, name) for name in names} | made)

    @classmethod
    def load(cls, folder: Path) -> Assets:
        """Read what ``save`` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        answers, meta = (_read_own(folder / name) for name in (ANSWERS_FILE, META_FILE))
        kind: Any = meta.get("kind", "label") if _is_meta(meta) else None
        if kind not in (*_TASKS,):  # the file may hold anything
            raise DataError(f"'{folder / META_FILE}' does not describe a data set; use an undamaged checkpoint")
        named = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
        if not named or (kind == "label" and not answers):
            raise DataError(f"'{folder / ANSWERS_FILE}' is not a list of answers; use an undamaged checkpoint")
        own = (folder / PROCESSOR).is_dir()
        return cls(
            None if own else load_tokenizer(folder),
            answers,
            soft=bool(meta.get("soft")),
            regions=cast("Regions", meta["regions"]),
            feature_dim=meta.get("feature_dim"),
            extractor=meta.get("extractor"),
            maker=meta.get("maker"),
            kind=kind,
            processor=load_processor(folder / PROCESSOR, local=True) if own else None,
        )


def _read_own(path: Path) -> Any:
    with reading(f"cannot read '{path}'; use a checkpoint with its assets folder", "or mend the file"):
        return read_own(path)


def _is_meta(meta: Any) -> bool:
    """Return whether a value has the form that ``save`` writes, apart from its kind."""
    if not isinstance(meta, dict) or meta.get("regions") not in (*REGION_FIELDS, "none"):
        return False
    width, extractor, soft = meta.get("feature_dim"), meta.get("extractor"), meta.get("soft", False)
    sized = width is None or (is_count(width) and width > 0)
    made = meta.get("maker") is None or is_maker(meta["maker"])
    return sized and (extractor is None or is_signature(extractor)) and isinstance(soft, bool) and made


def facts_beside(source: str) -> DataFacts:
    """Return the names of the rows of weights, and how texts and images were read for them.

    Args:
        source: what ``model.checkpoint`` names: the folder of a checkpoint, a saved folder, a transformers folder or
            hub name, or a file. A file in such a folder has the folder's names; beside others, ``vocab.txt`` names the
            word-pieces that it lists.

    Returns:
        The facts; empty if there are no names, or they cannot be read.
    """
    path, assets = from_home(source), assets_beside(source)
    if assets is not None:
        return _of_assets(assets)
    folder = path.parent if path.name in FOLDER_FILES else path
    if is_transformers_folder(folder):
        return _of_transformers(folder, None)
    if is_hub_name(source):
        return _of_transformers(folder, source)
    tokens = _of_tokenizer(path if path.is_dir() else path.parent / "vocab.txt").tokens
    return DataFacts() if tokens is None else DataFacts(vocab_size=len(tokens), tokens=tokens)


def assets_beside(source: str) -> Path | None:
    """Return the assets folder of a checkpoint or saved folder, if there is one."""
    path = from_home(source)
    folder = path.parent if path.name in FOLDER_FILES else path
    places = (folder / OWN / ASSETS, folder / ASSETS)
    return next((place for place in places if (place / META_FILE).is_file()), None)


def _of_assets(assets: Path) -> DataFacts:
    """Return the facts that a data set saved beside a checkpoint."""
    kept = _json(assets / META_FILE)
    kept = kept if isinstance(kept, dict) else {}
    if "regions" in kept:
        try:
            facts = Assets.load(assets).facts()
        except VillaError:
            return DataFacts()
        return replace(facts, vocab_size=None, reading={**facts.reading, **_scaled(assets, kept["regions"])})
    facts = _of_tokenizer(assets) if (assets / TOKENIZER_FILE).is_file() else DataFacts()
    answers, tokens, reading = _json(assets / ANSWERS_FILE), kept.get("tokens"), kept.get("reading")
    labels = answers if answers is not None else kept.get("labels")
    named = {"tokenizer": kept["tokenizer"]} if isinstance(kept.get("tokenizer"), str) else {}
    return replace(
        facts,
        tokens=facts.tokens if facts.tokens is not None or not isinstance(tokens, list) else tuple(tokens),
        labels=_texts(labels),
        reading={**facts.reading, **named, **(reading if isinstance(reading, dict) else {})},
    )


def _of_transformers(folder: Path, name: str | None) -> DataFacts:
    """Return the facts in a transformers folder, or under a name in the hub's cache."""
    place: Any = folder if name is None else name
    facts = DataFacts()
    try:
        processor = load_processor(place, local=name is None)  # the weights of a hub name are downloaded later, too
        tokenizer = getattr(processor, "tokenizer", processor)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # else transformers made it up without files
            texts = text_facts(processor)
            images = image_reading(processor) if hasattr(processor, "image_processor") else {}
            facts = DataFacts(tokens=texts["tokens"], padding=texts["padding"], reading={**texts["reading"], **images})
    except VillaError:
        facts = _of_tokenizer(folder)
    try:
        labels = stored_config(str(place)).id2label
    except Exception:  # transformers raises all kinds for folders that hold only weights
        return facts
    numbers = sorted(labels) if labels else []
    return replace(facts, labels=tuple(str(labels[n]) for n in numbers) if numbers == [*range(len(numbers))] else None)


def _of_tokenizer(place: Path) -> DataFacts:
    try:
        return DataFacts(**text_facts(load_tokenizer(place)))
    except VillaError:
        return DataFacts()


def _scaled(assets: Path, regions: str) -> dict[str, str]:
    return scaled_reading((assets / STATISTICS_FILE).is_file()) if regions in ("grid", "files") else {}


def _texts(value: Any) -> tuple[str, ...] | None:
    texts = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return tuple(value) if texts else None


def _json(path: Path) -> Any:
    try:
        return read_own(path)
    except (OSError, ValueError):
        return None
