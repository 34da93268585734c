"""``villa_run``: load the recipe, then run it."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from villa.command import Parser, run_command, show

if TYPE_CHECKING:
    from villa.config import Loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_run --help`` describes it.

    Args:
        argv: the arguments; None uses those of the process.

    Returns:
        The exit code: 0, 2 for a mistake in the input (reported in one line on stderr), 128 + the number of the signal
        that ended the command.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that Python shows no traceback for it, also at its end
    return run_command("villa_run", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    options = _parser().parse_intermixed_args(list(argv))
    page = _page(options)
    if page is not None:
        return show(page)
    if options.list is not None:
        return _list(options.list, options.values)
    if options.compare is not None:
        return _compare(options)
    from villa.distributed.joining import run_joined

    _join_started(options)
    work = _study if options.study is not None else _sweep if options.sweep is not None else _run
    return run_joined(lambda: work(options))


def _page(options: argparse.Namespace) -> str | None:
    """Return what an argument that starts no run prints, or None if there is none."""
    if options.version:
        return f"villa_run {_version()}\n"
    if options.completion is not None or options.complete is not None:
        return _completion(options)
    if options.new is not None:
        from villa.cli.skeletons import write_skeleton

        return write_skeleton(*options.new)
    if options.help:
        from villa.cli.pages import help_text

        return help_text(options.values)
    if options.values[:1] == ["doctor"]:
        from villa.cli.doctor import report

        return report(options.values[1:])
    return None


def _join_started(options: argparse.Namespace) -> None:
    """Join processes started by srun or mpirun into one run if its strategy is for several processes.

    Otherwise each process may be a run of its own, with its own arguments, unless they are known to be the same.
    """
    from villa.distributed.environment import Started

    started = Started.read(os.environ)
    if started is None:
        return
    from villa.config import load_stages
    from villa.errors import ConfigError, VillaError

    try:
        strategies = {stage.config.distributed.strategy for stage in load_stages(options.values)}
        if strategies != {"single"}:
            started.adopt(os.environ)
        elif started.direct and not _shows(options):
            raise ConfigError(
                f"{started.program} has started {started.count} processes, but distributed.strategy is 'single', which "
                "has one; set it to ddp or fsdp, or start one task (WORLD_SIZE=1 makes each a run of its own)"
            )
    except VillaError as error:
        started.refuse(error)


def _shows(options: argparse.Namespace) -> bool:
    """Return whether a recipe is only looked at."""
    return bool(options.print_config or options.parameters or options.perturbation_points or options.dry_run)


def _run(options: argparse.Namespace) -> int:
    from villa.config import load_stages

    gc.disable()  # what torch makes stays: walking through it, again and again, takes a fifth of a plan's time
    try:
        stages = load_stages(options.values)
    finally:
        gc.freeze()
        gc.enable()
    if options.print_config:
        return show("".join(_printed(stage, origins=not options.no_origins) for stage in stages))
    for notice in (notice for stage in stages for notice in stage.notices):
        print(f"villa_run: {notice}", file=sys.stderr)
    if options.perturbation_points:
        from villa.planning.dry_run import describe_points

        return show("".join(f"{line}\n" for stage in stages for line in describe_points(stage.config)))
    if options.parameters:
        from villa.planning.parameters import describe_parameters

        return show("".join(f"{line}\n" for stage in stages for line in describe_parameters(stage.config)))
    if options.dry_run:
        from villa.planning.dry_run import dry_run

        return show("".join(f"{line}\n" for line in dry_run(options.values, stages)))
    from villa.launch.base import Request, launcher_of

    chosen = stages[0].config
    if chosen.launcher.name != "inline":
        _refuse_several(f"launcher={chosen.launcher.name}")
    return launcher_of(chosen).launch(Request(tuple(options.values), [stage.config for stage in stages]))


def _parser() -> Parser:
    parser = Parser("villa_run", add_help=False)
    parser.add_argument("values", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    for flag in ("--version", "--print-config", "--no-origins", "--perturbation-points", "--parameters", "--dry-run"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--list", nargs="?", const="all")
    parser.add_argument("--sweep", nargs="+")
    parser.add_argument("--study")
    parser.add_argument("--at-once", type=int)
    parser.add_argument("--compare", nargs="+")
    parser.add_argument("--new", nargs=2)
    parser.add_argument("--completion")
    parser.add_argument("--complete")
    return parser


def _completion(options: argparse.Namespace) -> str:
    """Return the script for a shell, or the words that may end the line that it gives."""
    import dataclasses

    from villa.cli.completion import SCRIPTS, candidates, script
    from villa.cli.skeletons import KINDS
    from villa.config.schema import RunConfig
    from villa.registry import REGISTRIES

    if options.completion is not None:
        return script(options.completion)
    followed = {
        "--help": [field.name for field in dataclasses.fields(RunConfig)],
        "--list": [*REGISTRIES],
        "--new": [*KINDS],
        "--completion": [*SCRIPTS],
        "--study": None,
        "--compare": None,
    }
    flags = [flag for flag in _parser().option_strings if flag not in ("-h", "--complete")]
    words = candidates(options.complete, {flag: followed.get(flag, []) for flag in flags})
    return "".join(f"{word}\n" for word in words)


def _printed(stage: Loaded, *, origins: bool) -> str:
    from villa.config import annotated, to_yaml

    return annotated(stage.config, stage.origins, stage.notices) if origins else to_yaml(stage.config)


def _sweep(options: argparse.Namespace) -> int:
    from villa.errors import ConfigError
    from villa.sweeps.axes import parse_axis, points
    from villa.sweeps.sweep import Sweep

    if _shows(options):
        raise ConfigError("--sweep trains; leave it out to look at one recipe")
    _refuse_several("--sweep")
    sweep = Sweep(options.values, points([parse_axis(argument) for argument in options.sweep]))
    code = sweep.run(options.at_once)
    if any(run.finished for run in sweep.runs):
        sweep.report()
    return code


def _study(options: argparse.Namespace) -> int:
    from villa.errors import ConfigError
    from villa.studies.study import Study

    if options.sweep is not None or _shows(options):
        raise ConfigError("--study runs what its recipe lists; leave the other options out to look at one recipe")
    _refuse_several("--study")
    return Study(options.study, options.values).run(options.at_once)


def _compare(options: argparse.Namespace) -> int:
    from villa.analysis.comparison import report

    return report([*options.values, *options.compare])


def _refuse_several(what: str) -> None:
    """Refuse to start runs if this is one of several processes started by torchrun or srun."""
    from villa.distributed.environment import Place
    from villa.errors import ConfigError

    count = Place.read(os.environ).world_size
    if count > 1:
        raise ConfigError(
            f"{what} starts processes itself, but this is one of {count} (WORLD_SIZE); start it without torchrun or "
            f"srun, and give launcher=local launcher.processes={count} for runs of {count} processes"
        )


def _list(kind: str, values: Sequence[str]) -> int:
    from villa.cli.pages import listing
    from villa.config.loader import import_plugins

    import_plugins(values)
    lines, problems = listing(kind)
    for problem in problems:
        print(f"villa_run: {problem}", file=sys.stderr)
    return show("\n".join(lines) + "\n")


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("villa")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
