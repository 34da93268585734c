r"""Make a text database of UNITER and VILLA from the annotations of a data set.

    python tools/make_text_db.py --task vqa --questions v2_OpenEnded_mscoco_train2014_questions.json \
        --annotations v2_mscoco_train2014_annotations.json --answers ans2label.json \
        --tokenizer vocab.txt --output txt_db/vqa_train.db

The same command again goes on with a conversion that was killed. docs/databases.md shows the commands of all tasks,
docs/benchmarks.md those of robustness benchmarks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from villa.command import Parser, run_command
from villa.convert.annotations import IMAGE_SETS
from villa.convert.benchmarks import add_group_options
from villa.convert.tasks import TASKS, TextOptions, make_text_database


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("make_text_db", description=__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=sorted(TASKS))
    add("--tokenizer", required=True, help="vocab.txt, tokenizer.json, a folder with one, or a name (bert-base-cased)")
    add("--output", required=True, type=Path, help="folder of the database, like txt_db/vqa_train.db")
    add("--tokenizer-name", help="what meta.json calls the tokenizer")
    add("--missing-images", type=Path, help="JSON list of feature files that do not exist; their texts are left out")
    add("--progress", choices=("auto", "on", "off"), default="auto")
    add("--annotations", type=Path, help="vqa, vcr, nlvr2, nlvr2_contrast, ve, itm, caption: the file of annotations")
    add("--questions", type=Path, help="vqa: the file of questions")
    add("--answers", type=Path, help="vqa: answer list, {answer: label}; by default built from the annotations")
    add("--answers-from", type=Path, nargs="+", help="vqa: build the answer list from these annotations instead")
    add("--min-occurrences", type=int, help="vqa: how often an answer of that list occurs (9)")
    add("--scores", choices=("soft", "thirds"), help="vqa: 0.3, 0.6, 0.9, 1 by the number of annotators, or thirds")
    add("--image-set", choices=IMAGE_SETS, help="vqa: images asked about; by default what the questions say")
    add("--split", nargs="+", help="vcr, re: the split; itm: one or several of train, restval, val, test")
    add("--refs", type=Path, help="re: refs.json")
    add("--instances", type=Path, help="re: instances.json")
    add("--object-order", type=Path, help="re: file with iid_to_ann_ids, the order of the ground-truth features")
    add_group_options(parser, "vqa")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; return 0, 2 for a mistake in the input (one line on stderr), or 130 when interrupted."""
    return run_command("make_text_db", lambda: _convert(vars(_parse(argv))))


def _convert(given: dict[str, Any]) -> int:
    common = {name: given.pop(name) for name in ("task", "tokenizer", "output")}
    extra = {name: given.pop(name) for name in ("tokenizer_name", "missing_images", "progress")}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    outcome = make_text_database(common["task"], TextOptions(**values), common["tokenizer"], common["output"], **extra)
    if outcome is None:
        print(f"{common['output']} is finished already")
        return 0
    notes = [f"{outcome.present:,} of them before"] if outcome.present else []
    notes += [f"{outcome.left_out:,} left out"] if outcome.left_out else []
    print(f"{common['output']}: {outcome.entries:,} examples" + (f" ({', '.join(notes)})" if notes else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
