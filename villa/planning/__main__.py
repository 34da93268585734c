"""Plan a recipe on many GPUs: ``python -m villa.planning config=RECIPE.yaml`` prints tables, and measures nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from villa.command import Parser, run_command
from villa.planning.dry_run import WIDTH, Sizes, plan_recipe
from villa.planning.plan import Plan, in_units
from villa.planning.scale import Cluster, Row, draw, memory_table, method_table, row, stored_bytes, time_table
from villa.planning.strategies import STRATEGIES

_AGAIN = "distributed.activation_checkpointing"
#: Methods that the recipe's method is compared with.
_METHODS = {
    "standard": ["trainer.name=standard"],
    "freelb, both modalities at once": ["trainer.name=freelb", "trainer.modality=both"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables.

    Args:
        argv: the arguments; None uses those of the process.

    Returns:
        0, or 2 for a mistake in the input (reported in one line on stderr).
    """
    return run_command("villa.planning", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    cluster = Cluster(**{field.name: getattr(options, field.name) for field in fields(Cluster)})
    kept, again = (_plan(options, f"{_AGAIN}={value}") for value in ("false", "true"))
    rows = _rows(kept, options, cluster)
    methods = {name: _plan(options, *values, f"{_AGAIN}=false") for name, values in _METHODS.items()}
    for table in (
        _assumed(kept, options, cluster),
        method_table({**methods, "the recipe": kept, "the recipe, layers computed twice": again}),
        memory_table(rows, _rows(again, options, cluster)),
        time_table(rows),
    ):
        print(*table, sep="\n", end="\n\n")
    if options.figure is not None:
        draw(rows, options.figure, " ".join(options.values))
    return 0


def _plan(options: argparse.Namespace, *more: str) -> Plan:
    """Return the plan of one process on a GPU."""
    values = [*options.values, *more]
    sizes = Sizes(options.tokens, options.regions)
    return plan_recipe(values, options.stage - 1, sizes, device="cuda", processes=1, strategy="single")[0]


def _rows(plan: Plan, options: argparse.Namespace, cluster: Cluster) -> list[Row]:
    size = stored_bytes(options.regions, WIDTH)
    return [row(plan, name, gpus, cluster, size) for gpus in options.gpus for name in options.strategies]


def _assumed(plan: Plan, options: argparse.Namespace, cluster: Cluster) -> Iterator[str]:
    sample = plan.parts[0].sample
    trained = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    yield f"- {in_units(trained)} parameters; an update is {sample.micro_batches} x {len(sample.batch)} examples"
    yield f"- examples of {options.tokens} tokens and {options.regions} regions"
    rates = in_units(cluster.inside, "B/s"), in_units(cluster.between, "B/s")
    yield f"- a GPU computes {in_units(cluster.flops, 'FLOP/s')}"
    yield f"- it sends {rates[0]} within its node of {cluster.per_node} GPUs, and {rates[1]} to others"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    cluster, sizes = Cluster(), Sizes()
    parser = Parser("python -m villa.planning", description=__doc__)
    parser.add_argument("values", nargs="+", help="the arguments of villa_run")
    parser.add_argument("--stage", type=int, default=1, help="of a recipe with stages (%(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 256, 2048], help="(%(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["ddp", "fairscale_sdp", "fsdp"])
    parser.add_argument("--tokens", type=int, default=sizes.tokens, help="of an example's text (%(default)s)")
    parser.add_argument("--regions", type=int, default=sizes.regions, help="of an image (%(default)s)")
    parser.add_argument("--flops", type=float, default=cluster.flops, help="FLOP/s of a GPU in training (%(default)s)")
    parser.add_argument("--inside", type=float, default=cluster.inside, help="B/s within a node (%(default)s)")
    parser.add_argument("--between", type=float, default=cluster.between, help="B/s between nodes (%(default)s)")
    parser.add_argument("--per-node", type=int, default=cluster.per_node, help="GPUs of a node (%(default)s)")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    return parser.parse_intermixed_args(list(argv))


if __name__ == "__main__":
    sys.exit(main())
