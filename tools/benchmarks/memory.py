"""Memory that updates take on a CPU, against the plan (``villa_run --dry-run``): UNITER-base by method and batch.

    python tools/benchmarks/memory.py                       # three methods, batches of 8 and 32: minutes
    python tools/benchmarks/memory.py distributed.activation_checkpointing=true --methods villa --examples 16
    python tools/benchmarks/memory.py --methods freelb --examples 8 --strategies fsdp --processes 1 2
    python tools/benchmarks/memory.py distributed.reduce_each_pass=true --examples 8 --strategies fsdp --processes 2

Options of the recipe come first. Every process of a case is a fresh one: a small model is trained first, so that
libraries are loaded and have their buffers; then resident memory is read, the model is built and trained for two
updates, and the growth to the peak (VmHWM of ``/proc/self/status``, Linux alone) is measured. Each of several
processes has a micro-batch of its own.

Parameters, gradients and optimiser state are what their storages add up to, on the largest rank, after an update's last
backward pass. While passes run, gradients may be whole, which the plan of the peak takes into account.

Not in the plan: what the allocator keeps of freed blocks. It is kept out of the measurement too, by
``MALLOC_MMAP_THRESHOLD_``: glibc then returns every block of over 64 KiB at once, where by default it keeps blocks of
up to 32 MiB for later.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from villa.batch import Batch
from villa.config import load_stages
from villa.config.schema import RunConfig
from villa.distributed.joining import joined
from villa.distributed.strategy import Strategy, strategy_of
from villa.engine.passes import ModelPasses, Precision
from villa.engine.updater import Updater
from villa.facts import DataFacts
from villa.models.base import Model
from villa.planning.measure import bytes_of, count
from villa.planning.plan import in_bytes
from villa.planning.strategies import STRATEGIES, rank_memory
from villa.registry import LOSSES, MODELS, OPTIMIZERS, SCHEDULERS, TRAINERS
from villa.share import Turn

VOCABULARY, LABELS, WIDTH = 28996, 3129, 2048
METHODS = {
    "standard": ["trainer=standard"],
    "freelb": ["trainer=freelb"],
    "villa": ["trainer=villa"],
    "villa_text": ["trainer=villa", "trainer.modality=text", "trainer.clean_loss=false"],
}
_SMALL = ["model.num_layers=1", "model.hidden_size=64", "model.num_heads=4"]
_KINDS = ("parameters", "gradients", "optimizer")


def recipe(method: str, strategy: str, optimizer: str, *others: str) -> RunConfig:
    """A recipe of UNITER-base with VQA's head; what it trains on is made here."""
    return load_stages(
        [
            *("model=uniter", "loss=binary_cross_entropy", f"optimizer={optimizer}", *METHODS[method]),
            *("dataset=easy_vqa", "batch.examples=1", "training.updates=2", "training.clip_norm=1"),
            *(f"distributed.strategy={strategy}", *others),
        ]
    )[0].config


def batch_of(examples: int, tokens: int, regions: int) -> Batch:
    """A random batch; every other text is shorter."""
    mask = torch.ones(examples, tokens, dtype=torch.bool)
    mask[::2, tokens // 2 :] = False
    return Batch(
        ids=[str(number) for number in range(examples)],
        input_ids=torch.randint(1, VOCABULARY, (examples, tokens)),
        attention_mask=mask,
        features=torch.rand(examples, regions, WIDTH),
        boxes=torch.rand(examples, regions, 4),
        region_mask=torch.ones(examples, regions, dtype=torch.bool),
        targets=torch.rand(examples, LABELS),
    )


def facts() -> DataFacts:
    """Sizes of VQA."""
    return DataFacts(vocab_size=VOCABULARY, num_labels=LABELS, feature_dim=WIDTH)


def train(config: RunConfig, batch: Batch, updates: int, strategy: Strategy) -> dict[str, int]:
    """Build the model and train it on one batch; return the bytes held after the last backward pass, by kind."""
    model: Model = MODELS.get(config.model.name).from_config(config.model, facts())
    strategy.apply(model)
    factory = OPTIMIZERS.get(config.optimizer.name)(config.optimizer)
    optimizer = strategy.optimizer(lambda: factory.build(model))
    precision = Precision(config.training.precision, torch.device("cpu"))
    updater = Updater(
        ModelPasses(model, LOSSES.get(config.loss.name)(config.loss), precision, 0, strategy),
        TRAINERS.get(config.trainer.name)(config.trainer),
        optimizer,
        SCHEDULERS.get(config.scheduler.name)(config.scheduler, updates),
        config.training,
    )
    held: dict[str, int] = {}
    optimizer.register_step_pre_hook(lambda *_: held.update(_held(model, optimizer)))
    for number in range(updates):
        updater.update(number + 1, [batch], [Turn(strategy.share.rank)])
    return held


def _held(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    state = (value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor))
    tensors = model.parameters(), gradients, state
    return {kind: bytes_of([_own(t) for t in each]) for kind, each in zip(_KINDS, tensors, strict=True)}


def _own(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return part


def measured(config: RunConfig, small: RunConfig, options: argparse.Namespace) -> dict[str, int]:
    """What this process holds, by kind, and the growth of its resident memory to its peak, in bytes."""
    torch.set_num_threads(1)
    strategy, warm = strategy_of(config.distributed), strategy_of(small.distributed)
    for each in (strategy, warm):
        each.connect()
    train(small, batch_of(2, options.tokens, options.regions), 2, warm)
    strategy.processes.barrier()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held = train(config, batch_of(*options.examples, options.tokens, options.regions), 2, strategy)
    return {**held, "measured": status("VmHWM") - before}


def status(field: str) -> int:
    """A size of this process in bytes, from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def planned(config: RunConfig, options: argparse.Namespace) -> dict[str, int]:
    """What the plan says that is held, and its peak, in bytes."""
    with torch.device("meta"):
        model: Model = MODELS.get(config.model.name).from_config(config.model, facts())
    counted = count(config, model, batch_of(*options.examples, options.tokens, options.regions))
    (processes,), distributed = options.processes, config.distributed
    memory = rank_memory(*(counted, model, distributed.strategy, processes), each_pass=distributed.reduce_each_pass)
    return {"planned": round(memory.peak), "planned_parameters": round(memory.parameters)}


def case(method: str, examples: int, strategy: str, processes: int, options: argparse.Namespace) -> dict[str, int]:
    """Measure a case in processes of its own; the largest value of any rank counts."""
    command = [sys.executable, __file__, *options.others, "--case", method, "--examples", str(examples)]
    command += [f"--tokens={options.tokens}", f"--regions={options.regions}", f"--optimizer={options.optimizer}"]
    command += ["--strategies", strategy, "--processes", str(processes)]
    started = [
        subprocess.Popen(command, env=place, stdout=subprocess.PIPE, text=True)  # noqa: S603 (itself)
        for place in _places(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{method} on {processes} processes with {strategy} failed")
    found: list[dict[str, int]] = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(each[name] for each in found) for name in found[0]}


def _places(processes: int) -> Iterable[dict[str, str]]:
    """The environment of every process."""
    common = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        yield common | (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {})


def main() -> None:
    """Measure and print a Markdown table."""
    options = _parse()
    if options.case:
        given = options.case, *options.strategies, options.optimizer
        small, config = (recipe(*given, *options.others, *more) for more in (_SMALL, []))
        out = sys.stdout  # ranks above 0 print nothing of their own
        with joined():
            found = measured(config, small, options) | planned(config, options)
            print(json.dumps(found), file=out, flush=True)
        os._exit(0)  # the threads of gloo may abort the interpreter's end
    print("| method | examples | strategy | parameters | gradients | optimiser | peak | planned | planned / peak | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in options.methods:
        for examples in options.examples:
            for strategy in options.strategies:
                for processes in options.processes:
                    started = time.perf_counter()
                    found = case(method, examples, strategy, processes, options)
                    _show(f"{method} | {examples} | {strategy} x {processes}", found, time.perf_counter() - started)


def _show(name: str, found: dict[str, int], seconds: float) -> None:
    sizes = " | ".join(in_bytes(found[kind]) for kind in (*_KINDS, "measured", "planned"))
    print(f"| {name} | {sizes} | {found['planned'] / found['measured']:.2f} | {seconds:.0f} |", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["standard", "freelb", "villa"])
    parser.add_argument("--examples", nargs="+", type=int, default=[8, 32], help="of a rank's micro-batch")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["single"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--optimizer", default="bert_adamw")
    parser.add_argument("--case", choices=METHODS, help=argparse.SUPPRESS)
    options, others = parser.parse_known_args()
    options.others = others
    return options


if __name__ == "__main__":
    main()
