"""NLVR v1: is a sentence true of a picture of three boxes with coloured shapes (Suhr et al., ACL 2017)?"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from villa.datasets.base import DatasetConfig
from villa.datasets.epochs import check_counts, check_fraction, share
from villa.datasets.own.assets import Assets
from villa.datasets.own.grid import GridExtractor
from villa.datasets.own.nlvr_scenes import Scene, SceneStore, file_of, read_scenes
from villa.datasets.own.question_answering import QuestionAnswering, QuestionAnsweringConfig
from villa.datasets.own.readers import Record
from villa.datasets.own.split import TableSplit
from villa.datasets.stores import ImageSource, RegionStore, files_digest
from villa.datasets.text import build_tokenizer
from villa.errors import ConfigError, DataError, nearest
from villa.files import local_path, sha256
from villa.registry import register_dataset

SPLITS = ("train", "val", "test")
_ANSWERS = ["false", "true"]
#: Upper bound on the words and characters of all sentences.
_VOCABULARY = 2048


@dataclass
class NlvrConfig(QuestionAnsweringConfig):
    """Options of NLVR v1.

    Attributes:
        root: folder of the release, with ``<split>/<split>.json`` and ``<split>/images``.
        train: splits of the release to train on.
        val: splits of the release to validate on.
        test: splits of the release to test on.
        held_out: share of the training sentences that are held out, with all their scenes, as split ``val`` instead.
        regions: ``scenes``, the grey boxes and objects that the files name; ``grid`` features, whole images as
            ``pixels``, or ``none`` for sentences without images. With a processor, images are read whole.
        pictures: pictures of a training scene, each with its boxes in another order; each is an example.
        test_pictures: likewise in validation and test. The metric ``consistency`` is about the pictures of a scene if
            there are several, and otherwise about the scenes of a sentence.
        fraction: share of the other training sentences to train on; smaller shares are subsets of larger ones.
        fraction_seed: seed of the choice of that share, and of the sentences that are held out.
        limit: maximum number of examples per split (the first ones), for quick runs.
    """

    name: str = "nlvr"
    max_text_length: int = 48
    root: str = "data/nlvr"
    train: list[str] = field(default_factory=lambda: ["train"])
    val: list[str] = field(default_factory=lambda: ["dev"])
    test: list[str] = field(default_factory=lambda: ["test"])
    held_out: float = 0.0
    regions: Literal["scenes", "grid", "pixels", "none"] = "scenes"
    pictures: int = 1
    test_pictures: int = 1
    fraction: float = 1.0
    fraction_seed: int = 0
    limit: int | None = None

    def check(self) -> None:
        """Check the ranges of the options."""
        super().check()
        check_fraction(self.fraction)
        self.check_kind("label")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"dataset.held_out={self.held_out} is not allowed; give a share of at least 0, below 1")
        check_counts(self, ("pictures", "test_pictures", "limit"))
        shared = {*self.train} & {*self.test, *([] if self.held_out else self.val)}
        if shared:
            advice = "" if shared & {*self.test} else ", or hold out sentences of it: dataset.held_out=0.15"
            raise ConfigError(f"split '{min(shared)}' of NLVR is trained on and scored; leave it out of one{advice}")


@register_dataset("nlvr")
class Nlvr(QuestionAnswering):
    """NLVR v1 in its released layout, by its structured scenes, grid features or pixels."""

    Config: ClassVar[type[DatasetConfig]] = NlvrConfig
    config: NlvrConfig

    def __init__(self, config: NlvrConfig, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        self._known: dict[Path, Mapping[str, Scene]] = {}

    def _build_assets(self) -> Assets:
        processor, regions = self._processor(), self.config.regions
        if processor is not None and regions in ("scenes", "grid"):
            regions = "pixels"
        widths = {"scenes": SceneStore.dim, "grid": GridExtractor.dim}
        sentences = sorted({scene.sentence for scene in self._scenes("train")})
        return Assets(
            build_tokenizer(sentences, _VOCABULARY) if processor is None else None,
            _ANSWERS,
            soft=False,
            regions="files" if regions == "scenes" else regions,
            feature_dim=widths.get(regions),
            extractor=SceneStore.extractor if regions == "scenes" else self._extractor(regions, processor),
            processor=processor,
        )

    def _training_images(self) -> tuple[list[ImageSource], range]:
        sources = self._sources(self._scenes("train"), self.config.pictures)
        return sources, range(len(sources))

    def split(self, name: str) -> TableSplit:
        """Return a split, after reading its scenes and extracting features that are not cached yet.

        Raises:
            DataError: a file is missing or damaged; the message names it, and the line.
        """
        scenes = self._scenes(name)
        pictures = self.config.pictures if name == "train" else self.config.test_pictures
        sources = self._sources(scenes, pictures)
        records = [
            self._record(scene, number, place * pictures + number)
            for place, scene in enumerate(scenes)
            for number in range(pictures)
        ][: self.config.limit]
        used = {image for record in records for image in record.images}
        store = self.open_store(sources, used) if self.vocabulary.regions != "none" else None
        return TableSplit(records, self.reader, store, self._left_out(name, len(sources), len(records)))

    def _record(self, scene: Scene, number: int, image: int) -> Record:
        group = scene.identifier if self.config.test_pictures > 1 else scene.group
        file = list(scene.pictures.values())[number]
        return Record(
            file.stem,
            scene.sentence,
            images=() if self.vocabulary.regions == "none" else (image,),
            target=None if scene.label is None else int(scene.label),
            where=scene.where,
            group=f"{file.stem.partition('-')[0]}-{group}",
        )

    def _feature_files(self, sources: Sequence[ImageSource]) -> RegionStore:
        return SceneStore(sources, self._scenes_of)

    def _sources(self, scenes: Iterable[Scene], pictures: int) -> list[ImageSource]:
        """Return the pictures of scenes, ``pictures`` of each.

        Raises:
            DataError: a scene has fewer.
        """
        found = []
        for scene in scenes:
            if len(scene.pictures) < pictures:
                problem = f"the scene has {len(scene.pictures)} pictures of the {pictures} that are asked for"
                raise DataError(f"{scene.where}: {problem}; lower dataset.pictures or dataset.test_pictures")
            found += [ImageSource(file, scene.where) for file in list(scene.pictures.values())[:pictures]]
        return found

    def _scenes(self, name: str) -> list[Scene]:
        """Return the scenes of a split, regardless of ``limit``."""
        if name not in SPLITS:
            raise DataError(f"nlvr has no split '{name}'{nearest(name, SPLITS)} (known: {', '.join(SPLITS)})")
        held_out = name == "val" and self.config.held_out > 0
        scenes = self._read(self.config.train if held_out else getattr(self.config, name), f"dataset.{name}")
        if name == "test" or (name == "val" and not held_out):
            return scenes
        unanswered = next((scene for scene in scenes if scene.label is None), None)
        if unanswered is not None:
            raise DataError(f"{unanswered.where}: 'label' is missing, but the split is trained on (dataset.train)")
        kept = self._kept(scenes, held_out=held_out)
        return [scene for scene in scenes if scene.sentence in kept]

    def _kept(self, scenes: Sequence[Scene], *, held_out: bool) -> set[str]:
        """Return the sentences that are held out of those of scenes, or those to train on."""
        options = self.config
        sentences = list(dict.fromkeys(scene.sentence for scene in scenes))
        apart = {*share(sentences, options.held_out, options.fraction_seed)} if options.held_out else set()
        if len(apart) == len(sentences):
            raise ConfigError(f"dataset.held_out={options.held_out} leaves none of {len(sentences)} sentences")
        rest = [sentence for sentence in sentences if sentence not in apart]
        return apart if held_out else {*share(rest, options.fraction, options.fraction_seed)}

    def _read(self, splits: Sequence[str], option: str) -> list[Scene]:
        if not splits:
            raise DataError(f"{option} names no split of NLVR; give one, such as dev")
        root = local_path(self.config.root)
        return [scene for split in splits for scene in self._scenes_of(file_of(root, split)).values()]

    def _scenes_of(self, file: Path) -> Mapping[str, Scene]:
        """Return the scenes of a file, which is read once."""
        if file not in self._known:
            self._known[file] = read_scenes(file)
        return self._known[file]

    def _left_out(self, name: str, count: int, kept: int) -> list[str]:
        """Return lines on what ``fraction`` and ``limit`` leave out of a split, if any."""
        fraction, limit = self.config.fraction, self.config.limit
        lines = [f"dataset.limit={limit}: {count - kept:,} of {count:,} examples are left out"] if kept < count else []
        if name == "train" and fraction < 1:
            lines.append(f"dataset.fraction={fraction}: of the sentences, that share is trained on")
        return lines

    def fingerprint(self) -> str:
        """Hash of the files, the pictures, the options and the extractor."""
        options = asdict(self.config) | {"cache_dir": None, "processor": None, "root": None}
        splits = sorted({*self.config.train, *self.config.val, *self.config.test})
        files = [file_of(local_path(self.config.root), split) for split in splits]
        parts: list[object] = [options, self.vocabulary.extractor, self.vocabulary.reading_fingerprint()]
        for file in (file for file in files if file.is_file()):
            most = max(self.config.pictures, self.config.test_pictures)
            sources = (
                ImageSource(path, scene.where)
                for scene in self._scenes_of(file).values()
                for path in list(scene.pictures.values())[:most]
            )
            parts += [sha256(file), files_digest(sources)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def reference_scores(self, split: str) -> dict[str, float]:
        """Return the accuracy on a split of the more frequent label of the training scenes."""
        often = Counter(scene.label for scene in self._scenes("train")).most_common(1)[0][0]
        return {"majority": float(np.mean([scene.label == often for scene in self._scenes(split)]))}
