"""Make an image database of UNITER and VILLA from a folder of .npz files of region features.

    python tools/make_image_db.py features/coco_train2014 img_db/coco_train2014 --conf-th 0.2 --max-boxes 100 --min-boxes 10
    python tools/make_image_db.py features/vcr_gt_train img_db/vcr_gt_train --fixed 100

The same command again goes on with a conversion that was killed. docs/databases.md says what a file holds.
"""  # noqa: E501

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from villa.command import Parser, run_command
from villa.convert.features import make_image_database
from villa.datasets.uniter.box_selection import BoxSelection


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("make_image_db", description=__doc__)
    add = parser.add_argument
    add("source", type=Path, help="folder of .npz files")
    add("output", type=Path, help="folder of the databases of these images, like img_db/coco_train2014")
    add("--conf-th", type=float, default=0.2, help="confidence above which a box is kept")
    add("--max-boxes", type=int, default=100, help="largest number of boxes an image")
    add("--min-boxes", type=int, default=10, help="smallest number of boxes an image")
    add("--fixed", type=int, help="keep the first so many boxes instead (100 for ground-truth boxes)")
    add("--allow-empty-boxes", action="store_true", help="accept boxes that have no width or no height")
    add("--compressed", action="store_true", help="compress the values: smaller, slower to read")
    add("--workers", type=int, default=0, help="processes that read files besides the one that writes")
    add("--progress", choices=("auto", "on", "off"), default="auto")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; return 0, 2 for a mistake in the input (one line on stderr), or 130 when interrupted."""
    return run_command("make_image_db", lambda: _convert(_parse(argv)))


def _convert(given: argparse.Namespace) -> int:
    boxes = BoxSelection(given.conf_th, given.max_boxes, given.min_boxes, given.fixed, given.compressed)
    options = {"workers": given.workers, "progress": given.progress, "allow_empty_boxes": given.allow_empty_boxes}
    outcome = make_image_database(given.source, given.output, boxes, **options)
    where = given.output / boxes.folder()
    if outcome is None:
        print(f"{where} is finished already")
    else:
        before = f" ({outcome.present:,} of them before)" if outcome.present else ""
        print(f"{where}: {outcome.entries:,} images{before}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
