"""``villa_push``: upload a trained model to the model hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from villa.command import Parser, run_command, show

_EPILOG = """\
The hub is asked with the token of 'hf auth login' or HF_TOKEN. What is uploaded has no path or name of this machine,
and no secret that can be told; --dry-run lists it.

  villa_push outputs/own_data/villa me/shapes --dry-run
  villa_push outputs/own_data/villa me/shapes --license mit --text 'Which shape is it?' --image circle.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_push --help`` describes it.

    Args:
        argv: the arguments; None uses those of the process.

    Returns:
        The exit code: 0, 2 for a mistake in the input (reported in one line on stderr), 130 when interrupted.
    """
    return run_command("villa_push", lambda: _push(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "villa_push",
        description="Upload a trained model to the model hub, with its card, recipe and scores; docs/hub.md.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run (its best checkpoint), a checkpoint or a saved folder")
    add("name", metavar="NAME", help="owner/name on the hub; made if it is not there")
    add("--dry-run", action="store_true", help="upload nothing, but list what would be, and show the card")
    add("--public", action="store_true", help="let everybody see it; by default it is private")
    add("--revision", metavar="BRANCH", help="branch, made if it is not there; by default the main one")
    add("--message", default="Upload the model", help="message of the commit")
    add("--license", metavar="NAME", help="in the hub's words, such as mit; default: that of the base model, if known")
    add("--text", help="text of the example on the model's page, which is answered")
    add("--image", metavar="FILE", help="image of the example, which is uploaded, too")
    add("--user-dir", "--user_dir", metavar="PATH", help="package or module to import first, for a model of your own")
    return parser


def _push(given: argparse.Namespace) -> int:
    import villa

    model = villa.from_pretrained(given.run, device="cpu", user_dir=given.user_dir)
    names = ("public", "revision", "message", "license", "text", "image", "dry_run")
    pushed = model.push_to_hub(given.name, **{name: getattr(given, name) for name in names})
    return show(f"{pushed.card}\n{pushed}\n" if given.dry_run else f"{pushed}\n")


if __name__ == "__main__":
    sys.exit(main())
