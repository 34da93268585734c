r"""Make a JSON-lines file of questions about images (dataset=jsonl) from the annotations of a data set.

    python tools/make_jsonl.py --task vqa --questions v2_OpenEnded_mscoco_val2014_questions.json \
        --annotations v2_mscoco_val2014_annotations.json --images val2014 --output vqa/val.jsonl

With --layout lxmert it is the list of records that LXMERT's tasks read. docs/vilt.md shows the commands of all tasks,
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
from villa.convert.line_tasks import LINE_TASKS, make_lines
from villa.convert.tasks import TextOptions


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("make_jsonl", description=__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=sorted(LINE_TASKS))
    add("--output", required=True, type=Path, help="file to write, like vqa/train.jsonl")
    add("--layout", choices=("jsonl", "lxmert"), default="jsonl", help="JSON lines, or a list for dataset=lxmert_*")
    add("--images", type=Path, help="folder of the images; without it they are named for dataset.image_root")
    add("--skip-missing", action="store_true", help="leave out questions whose images are not there")
    add("--answers-file", type=Path, help="also write the list of answers, one a line or .json (dataset.answers)")
    add("--force", action="store_true", help="replace files that are there")
    add("--progress", choices=("auto", "on", "off"), default="auto")
    add("--questions", type=Path, help="vqa, gqa: the file of questions")
    add("--annotations", type=Path, help="vqa, nlvr2, nlvr2_contrast, ve: the file of annotations")
    add("--answers-from", type=Path, nargs="+", help="list the answers of these files: vqa annotations, gqa questions")
    add("--min-occurrences", type=int, help="vqa: how often an answer of the list occurs (9)")
    add("--scores", choices=("soft", "thirds"), help="vqa: write scores of the answers instead of the ten answers")
    add("--image-set", choices=IMAGE_SETS, help="vqa: images asked about; by default what the questions say")
    add_group_options(parser, "vqa, gqa")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; return 0, 2 for a mistake in the input (one line on stderr), or 130 when interrupted."""
    return run_command("make_jsonl", lambda: _convert(vars(_parse(argv))))


def _convert(given: dict[str, Any]) -> int:
    task, output = given.pop("task"), given.pop("output")
    extra = {
        name: given.pop(name) for name in ("images", "layout", "answers_file", "skip_missing", "force", "progress")
    }
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    counts, answers = make_lines(task, TextOptions(**options), output, **extra)
    notes = f" ({counts.left_out:,} left out: no image)" if counts.left_out else ""
    print(f"{output}: {counts.written:,} questions{notes}")
    if answers is not None:
        print(f"{extra['answers_file']}: {answers:,} answers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
