"""The base of tasks on released files, which a recipe lists or which are generated for a trial run."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from villa.batch import Batch
from villa.datasets.base import DatasetConfig, Example, Split, TaskDataset
from villa.datasets.collation import collate
from villa.datasets.paths import SPLITS
from villa.datasets.synthetic import EXAMPLES, databases
from villa.datasets.synthetic.groups import GROUPED
from villa.datasets.synthetic.tasks import write_databases
from villa.errors import ConfigError, DataError, reading
from villa.files import plain_path, write_json
from villa.json_values import is_count, read_own

#: Files in which a checkpoint keeps facts about its training data.
FACTS_FILE, ANSWERS_FILE = "dataset.json", "answers.json"


@dataclass
class ReleasedFilesConfig(DatasetConfig):
    """Options of the tasks on released files; relative paths are below ``root``.

    Attributes:
        name: the registered name.
        root: folder that the other paths are relative to.
        synthetic: try the recipe with a tiny model on small generated files of the same format.
        synthetic_examples: training examples to generate; evaluation splits get a quarter of them.
        synthetic_groups: generate the test split of a robustness benchmark: rephrased questions (VQA), contrast sets
            (NLVR2), or rare and frequent answers (GQA).
        allow_empty_boxes: accept boxes without width or height.
    """

    root: str = "data"
    synthetic: bool = False
    synthetic_examples: int = EXAMPLES
    synthetic_groups: bool = False
    allow_empty_boxes: bool = False

    def check(self) -> None:
        """Refuse options that cannot be combined.

        Raises:
            ConfigError: naming the option.
        """
        if self.synthetic_examples < 32:
            raise ConfigError(f"dataset.synthetic_examples={self.synthetic_examples} is too small; give at least 32")
        if self.synthetic_groups and self.name not in GROUPED:
            raise ConfigError(
                f"dataset.synthetic_groups=true is for {', '.join(GROUPED)}, not for '{self.name}'; leave it out"
            )


class ReleasedFilesTask(TaskDataset):
    """A task on released files. Subclasses list the files of a split and open them."""

    Config: ClassVar[type[DatasetConfig]] = ReleasedFilesConfig
    config: ReleasedFilesConfig
    #: Writes generated files: task, number of training examples, folder, and whether the test split has groups.
    generator: ClassVar[Callable[..., None]] = staticmethod(write_databases)

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        config.check()
        self._splits: dict[str, Split] = {}

    @abstractmethod
    def listed(self, split: str) -> Sequence[str]:
        """Return the files that the recipe lists for a split."""

    @abstractmethod
    def open_split(self, name: str) -> Split:
        """Open the files of a split, and check that every image that they name exists.

        Raises:
            DataError: the recipe lists none, or they cannot be used.
        """

    @abstractmethod
    def contents(self) -> Iterator[Any]:
        """Yield JSON values that identify the data of the splits that are present."""

    @cached_property
    def root(self) -> Path:
        """Folder of the files, or of the generated ones."""
        return self.generated() if self.config.synthetic else plain_path(self.config.root)

    def generated(self) -> Path:
        """Return the folder of the generated files."""
        name, grouped = self.config.name, self.config.synthetic_groups

        def write(_: str, examples: int, root: Path) -> None:
            self.generator(name, examples, root, grouped=grouped)

        return databases(f"{name}_groups" if grouped else name, self.config.synthetic_examples, write)

    def splits(self) -> tuple[str, ...]:
        """Return the splits that the recipe lists files for."""
        return SPLITS if self.config.synthetic else tuple(split for split in SPLITS if self.listed(split))

    def split(self, name: str) -> Split:
        """Return a split.

        The training split opens all others too, so that their faults are found before training.
        """
        for wanted in (name, *(self.splits() if name == "train" else ())):
            if wanted not in self._splits:
                self._splits[wanted] = self.open_split(wanted)
        return self._splits[name]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch."""
        return collate(examples)

    def kept_facts(self) -> dict[str, Any]:
        """Return the facts that a checkpoint keeps, as a JSON object."""
        return asdict(self.facts())

    @cached_property
    def trained_facts(self) -> dict[str, Any]:
        """Facts that the checkpoint kept about its data, with the sizes ``feature_dim`` and ``vocab_size``.

        They are cached, since a resumed run may later remove the checkpoint.

        Raises:
            DataError: the file is missing or damaged.
        """
        assert self.assets is not None
        path, advice = self.assets / FACTS_FILE, "use a checkpoint with its assets"
        with reading(f"the facts of the training data '{path}' cannot be read", advice):
            facts = read_own(path)
        if not isinstance(facts, dict) or not all(is_count(facts.get(name)) for name in ("feature_dim", "vocab_size")):
            raise DataError(f"'{path}' does not hold the sizes of the training data; {advice}")
        return facts

    def save_assets(self, folder: Path) -> None:
        """Write the sizes that the data fixes."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FACTS_FILE, self.kept_facts())

    def fingerprint(self) -> str:
        """Return a hash of the options and the contents."""
        options = asdict(self.config) | {"root": None}
        del options["allow_empty_boxes"]  # it changes no example
        if not self.config.synthetic_groups:
            del options["synthetic_groups"]
        parts = [options, *self.contents()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
