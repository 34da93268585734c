r"""VILLA's two stages on pictures, from nothing to a table: is it worth being adversarial in either, or in both?

    python projects/villa/two_stage/run.py easy_vqa
    python projects/villa/two_stage/run.py daquar --data daquar --weights minilm

Pictures with questions become captions, region features and databases; a model is pre-trained on the captions, in a
first half that all rows share and a second half that is standard or adversarial; and each result is finetuned on few
and on all questions, standard or adversarial, with every seed. The same command again goes on with what is missing.
docs/two_stage.md tells what came out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from databases import BLANK, Options, write_databases
from sources import SOURCES, SPLITS

from villa.command import Parser, run_command
from villa.errors import ConfigError
from villa.sweeps.axes import Axis, points
from villa.sweeps.sweep import Sweep

HERE = Path(__file__).parent


#: What "adversarial" means in both stages: the options of VILLA, all values our own.
ADVERSARIAL = (
    *("trainer=villa", "trainer.modality=both", "trainer.steps=3", "trainer.kl_weight=1.0"),
    *("trainer.text_step_size=0.02", "trainer.image_step_size=0.2"),
)


@dataclass(frozen=True)
class Study:
    """What is compared on a data set.

    Attributes:
        grid: cells a side of the region features.
        image_size: pixels a side that pictures are resized to.
        fractions: shares of the questions to finetune on, with the updates for each.
    """

    grid: int
    image_size: int
    fractions: dict[str, int]


STUDIES = {
    "easy_vqa": Study(grid=2, image_size=128, fractions={"0.05": 300, "1.0": 800}),
    "daquar": Study(grid=3, image_size=288, fractions={"1.0": 300}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return 0, 1 if a run failed, 2 for a mistake in the input, 128 + a signal's number after it."""
    return run_command("two_stage", lambda: _study(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("two_stage", description=__doc__)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--data", type=Path, help="DAQUAR's folder: all_qa_pairs.txt, the lists of images, images/")
    parser.add_argument("--weights", type=Path, help="DAQUAR: folder of the BERT to start from, with its vocab.txt")
    parser.add_argument("--output", type=Path, help="folder of everything (outputs/two_stage/<study>)")
    parser.add_argument("--pictures", type=int, help="only the first so many of every split, to try it")
    parser.add_argument("--seeds", default="1,2,3", help="seeds, separated by commas (1,2,3)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at once (2)")
    parser.add_argument("--only-databases", action="store_true", help="make the data, and stop")
    parser.add_argument(
        "overrides", nargs="*", help="section.option=value for every run, to try it: training.updates=2"
    )
    return parser.parse_intermixed_args(argv)


def _study(given: argparse.Namespace) -> int:
    study, output = STUDIES[given.study], given.output or Path("outputs/two_stage") / given.study
    if given.weights is not None and not (given.weights / "vocab.txt").is_file():
        raise ConfigError(f"--weights '{given.weights}' holds no vocab.txt; give the folder of a BERT")
    vocabulary = None if given.weights is None else given.weights / "vocab.txt"
    pictures = SOURCES[given.study](given.data)
    if given.pictures is not None:
        pictures = pictures.first(given.pictures)
    write_databases(pictures, output / "data", Options(study.grid, study.image_size, vocabulary))
    if given.only_databases:
        return 0
    plan = Plan(given.study, output, tuple(given.overrides), given.seeds.split(","))
    for sweep in (plan.first_half(given.weights), plan.second_half()):
        code = sweep.run(given.at_once)
        if code:
            return code
    finetuning = plan.finetuning(study.fractions, given.weights)
    code = finetuning.run(given.at_once)
    finetuning.report()
    return code


@dataclass(frozen=True)
class Plan:
    """The sweeps of a study.

    Attributes:
        study: its name.
        output: folder of everything.
        overrides: for every run; they win over all else.
        seeds: of all runs.
    """

    study: str
    output: Path
    overrides: tuple[str, ...]
    seeds: Sequence[str]

    def first_half(self, weights: Path | None) -> Sweep:
        """Standard pre-training, from the given weights or from nothing."""
        start = () if weights is None else (f"model.checkpoint={weights}",)
        return self._sweep("pretrain", "first_half", [], start)

    def second_half(self) -> Sweep:
        """Its continuation, standard or adversarial, with other masks and another order."""
        start = [f"model.checkpoint={self.output}/first_half/seed=${{seed}}"]
        kinds = {"standard": start, "adversarial": [*start, *ADVERSARIAL, "trainer.objectives=[mlm,itm_wra]"]}
        return self._sweep("pretrain", "second_half", [Axis("pretraining", kinds)])

    def finetuning(self, fractions: dict[str, int], weights: Path | None) -> Sweep:
        """Finetuning on shares of the questions: the paper's four rows, and two to compare them with."""
        shares = {share: [f"dataset.fraction={share}", f"training.updates={n}"] for share, n in fractions.items()}
        fresh = () if weights is None else (f"model.checkpoint={weights}",)
        blank = [f"dataset.{split}_images=[{BLANK}]" for split in SPLITS]
        rows = {"no images": [*fresh, *blank], "no pre-training": fresh, "standard": self._second("standard")}
        rows["adversarial pre-training"] = self._second("adversarial")
        rows["adversarial finetuning"] = [*rows["standard"], *ADVERSARIAL]
        rows["both adversarial"] = [*rows["adversarial pre-training"], *ADVERSARIAL]
        return self._sweep("finetune", "finetuning", [Axis("fraction", shares), Axis("training", rows)])

    def _second(self, kind: str) -> list[str]:
        """Start from a second half of pre-training, of the same seed."""
        return [f"model.checkpoint={self.output}/second_half/pretraining={kind},seed=${{seed}}"]

    def _sweep(self, recipe: str, folder: str, axes: list[Axis], start: tuple[str, ...] = ()) -> Sweep:
        seeds = Axis("seed", {seed: [f"seed={seed}", *self.overrides] for seed in self.seeds})
        arguments = [f"config={HERE / f'{self.study}_{recipe}.yaml'}", f"dataset.root={self.output / 'data'}"]
        return Sweep([*arguments, *start], points([*axes, seeds]), self.output / folder)


if __name__ == "__main__":
    sys.exit(main())
