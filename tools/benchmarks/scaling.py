"""Cost of an update of UNITER against steps, examples, length, layers and processes, one changed at a time.

    python tools/benchmarks/scaling.py                       # VILLA on a small model: two minutes
    python tools/benchmarks/scaling.py --size base-2 --method text_fast

Every row is a process of its own with one thread (``processes`` 2: two, by ``torchrun`` and ``ddp``, with half of the
examples each). Columns: the median time of an update on the clock, and of its first process in CPU time; FLOPs of that
process; and each over that of the first row of its block.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from updates import _TRAINERS, SIZES, batch_of, model_of

#: Values of every factor; the first of each is the usual one. Length is that of texts and images together.
FACTORS: dict[str, tuple[int, ...]] = {
    "steps": (3, 1, 2, 5),
    "examples": (8, 4, 16, 32),
    "length": (70, 35, 140),
    "layers": (0, 1, 2),  # 0: those of the size
    "processes": (1, 2),
}


def work(case: argparse.Namespace) -> None:
    """Run updates as one of the processes; the first prints what it has measured."""
    from villa.batch import Batch
    from villa.config.schema import DistributedConfig
    from villa.distributed.joining import joined
    from villa.distributed.strategy import strategy_of
    from villa.engine.passes import ModelPasses, Precision
    from villa.engine.setup import build_trainer
    from villa.engine.updater import Updater
    from villa.registry import LOSSES, OPTIMIZERS, SCHEDULERS

    torch.set_num_threads(1)
    config, model = model_of(case)
    whole = batch_of(case)

    def part(rows: slice) -> Batch:
        tensors = {name: value[rows] for name, value in vars(whole).items() if isinstance(value, Tensor)}
        return replace(whole, ids=whole.ids[rows], **tensors)

    with joined():
        strategy = strategy_of(DistributedConfig(strategy="ddp" if case.processes > 1 else "single"))
        strategy.connect()
        strategy.apply(model)
        passes = ModelPasses(model, LOSSES.get(config.loss.name)(config.loss), Precision(case.dtype, _CPU), 0, strategy)
        factory, schedule = OPTIMIZERS.get(config.optimizer.name)(config.optimizer), SCHEDULERS.get("constant")
        updater = Updater(
            passes,
            build_trainer(config, model),
            strategy.optimizer(lambda: factory.build(model)),
            schedule(config.scheduler, 1000),
            config.training,
        )
        size, turns = case.examples // case.processes, strategy.share.turns(case.processes)
        batches = [part(slice(turn.number * size, (turn.number + 1) * size)) for turn in turns]
        with FlopCounterMode(display=False) as counter:
            updater.update(1, batches, turns)
        times = []
        for number in range(2, case.rounds + 2):
            clock, cpu = time.perf_counter(), time.process_time()
            updater.update(number, batches, turns)
            times.append((time.perf_counter() - clock, time.process_time() - cpu))
        if strategy.processes.rank == 0:
            seconds = [statistics.median(column) for column in zip(*times, strict=True)]
            print(json.dumps([*seconds, counter.get_total_flops()]), flush=True)


_CPU = torch.device("cpu")


def measure(options: argparse.Namespace, factor: str, value: int) -> list[float]:
    """Start the processes of one row; return seconds on the clock and of the CPU, and FLOPs."""
    usual: dict[str, Any] = {name: values[0] for name, values in FACTORS.items()} | {factor: value}
    arguments = [f"--{name}={given}" for name, given in usual.items()]
    arguments += [f"--{name}={getattr(options, name)}" for name in ("size", "method", "rounds")]
    start = [sys.executable, __file__]
    if usual["processes"] > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    place = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, "--work", *arguments], env=place, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    found: list[float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return found


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--method", choices=_TRAINERS, default="text")
    parser.add_argument("--factor", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    for name, values in FACTORS.items():
        parser.add_argument(f"--{name}", type=int, default=values[0], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        tokens = options.length * 2 // 7
        more = [f"trainer.steps={options.steps}"] if options.method != "standard" else []
        more += [f"model.num_layers={options.layers}"] if options.layers else []
        case = {"tokens": tokens, "regions": options.length - tokens, "options": more}
        fixed = {"task": "vqa", "dtype": "fp32", "padding": 0.2, "dropout": 0.1}
        work(argparse.Namespace(**vars(options) | case | fixed))
        return
    print(f"{options.method}, {options.size}\n")
    print("| factor | value | ms | CPU ms | GFLOP | clock | CPU | FLOPs |\n|---|---|---|---|---|---|---|---|")
    for factor in options.factor:
        first: list[float] = []
        for value in FACTORS[factor]:
            found = measure(options, factor, value)
            first = first or found
            clock, cpu, flops = found
            ratios = " | ".join(f"{mine / usual:.2f}" for mine, usual in zip(found, first, strict=True))
            shown = SIZES[options.size][0] if factor == "layers" and not value else value
            print(f"| {factor} | {shown} | {1e3 * clock:.1f} | {1e3 * cpu:.1f} | {flops / 1e9:.3g} | {ratios} |")


if __name__ == "__main__":
    main()
