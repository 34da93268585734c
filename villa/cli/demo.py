"""``villa_demo``: a page in the browser on which a trained model answers questions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from villa.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_demo --help`` describes it.

    Args:
        argv: the arguments; None uses those of the process.

    Returns:
        The exit code: 2 for a mistake in the input (reported in one line on stderr), 130 when interrupted.
    """
    return run_command("villa_demo", lambda: _demo(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "villa_demo",
        description="Serve a page on which a trained model answers questions about images, with scores, its\n"
        "attention, and an adversary that perturbs text, image or both; docs/demo.md.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, a checkpoint, a saved folder, or a name on the hub (owner/name@revision)")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1); 0.0.0.0 lets other machines in")
    add("--port", type=int, default=7860, help="port to listen at (7860); 0 takes a free one")
    add("--open", action="store_true", help="open the page in the browser")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--user-dir", "--user_dir", metavar="PATH", help="package or module to import first, for a model of your own")
    return parser


def _demo(given: argparse.Namespace) -> int:
    import villa

    villa.demo(
        given.run,
        host=given.host,
        port=given.port,
        open_browser=given.open,
        device=given.device,
        user_dir=given.user_dir,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
