"""``villa_extract``: region features of images, for the data sets to read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from villa.command import Parser, run_command, show

_EPILOG = """\
OPTION=VALUE are options of the extractor: villa_extract --options EXTRACTOR lists them, villa_run --list extractors
the extractors. The same command again goes on with what was killed.

  villa_extract photos img_db/photos --weights unc-nlp/frcnn-vg-finetuned --boxes 10:100:0.2
  villa_extract photos.tar features/photos.tsv --weights detector/ --boxes 36
  villa_extract photos.jsonl features --format npz --extractor transformers model=openai/clip-vit-base-patch32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_extract --help`` describes it.

    Args:
        argv: the arguments; None uses those of the process.

    Returns:
        The exit code: 0, 2 for a mistake in the input (reported in one line on stderr), 130 when interrupted.
    """
    return run_command("villa_extract", lambda: _extract(_parser().parse_intermixed_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "villa_extract",
        description="Extract region features of images: of a folder, a tar, JSON lines with 'image' (and 'name'),\n"
        "or a file with one path a line.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", nargs="?", help="the folder or file")
    add("output", metavar="OUTPUT", nargs="?", help="folder of the image database or feature files, or a .tsv file")
    add("values", metavar="OPTION=VALUE", nargs="*", help="options of the extractor")
    add("--extractor", default="bottom_up", metavar="NAME", help="what makes the features (bottom_up)")
    add("--weights", metavar="PATH", help="the extractor's weights: a file, a folder, or a name on the hub")
    add("--boxes", metavar="N|MIN:MAX[:CONF]", help="boxes of an image: 36, 10:100 or 10:100:0.2")
    add("--format", choices=("lmdb", "tsv", "npz", "safetensors"), help="default: tsv for a .tsv, else lmdb")
    add("--compressed", action="store_true", help="compress the values of the database")
    add("--workers", type=int, default=4, metavar="N", help="threads that read images (4)")
    add("--batch", type=int, default=8, metavar="N", help="images that the network gets at a time (8)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="what to do about an image that cannot be used")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--progress", choices=("auto", "on", "off"), default="auto")
    add("--options", metavar="EXTRACTOR", help="list the options of an extractor, and stop")
    add("--user-dir", "--user_dir", metavar="PATH", help="package or module that registers an extractor of your own")
    return parser


def _extract(given: argparse.Namespace) -> int:
    from villa.errors import ConfigError
    from villa.plugins import load_user_dir

    if given.user_dir is not None:
        load_user_dir(given.user_dir)
    if given.options is not None:
        from villa.cli.pages import extractor_page

        return show(extractor_page(given.options))
    if given.images is None or given.output is None:
        raise ConfigError("give IMAGES and OUTPUT; villa_extract --help shows the usage")
    from villa.config.layers import parse_overrides
    from villa.extraction.run import Job, extract

    named = (f"{name}={getattr(given, name)}" for name in ("weights", "boxes") if getattr(given, name) is not None)
    _, options = parse_overrides([*named, *given.values])
    names = ("format", "compressed", "workers", "batch", "on_error", "device", "progress")
    done = extract(
        given.images, given.output, given.extractor, options, Job(**{name: getattr(given, name) for name in names})
    )
    return show(f"{done}\n")


if __name__ == "__main__":
    sys.exit(main())
