"""Memory that updates take on a CPU, against the plan (``villa_run --dry-run``): UNITER-base by method and batch.

    python tools/benchmarks/memory.py                       # three methods, batches of 8 and 32: minutes
    python tools/benchmarks/memory.py --methods villa --examples 16

Every case runs in a fresh process: a small model is trained first, so that libraries are loaded and have their buffers;
then resident memory is read, the model is built and trained for two updates, and the growth to the peak (VmHWM of
``/proc/self/status``, Linux alone) is the measured number. Not in the plan: what the allocator keeps of freed blocks.
It is kept out of the measurement too, by ``MALLOC_MMAP_THRESHOLD_``: glibc then returns every block of over 64 KiB at
once, where by default it keeps blocks of up to 32 MiB for later.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from villa.batch import Batch
from villa.config import load_stages
from villa.config.schema import RunConfig
from villa.engine.precision import Precision
from villa.engine.updater import Updater
from villa.models.base import DataFacts, Model
from villa.planning.measure import count
from villa.planning.strategies import rank_memory
from villa.planning.units import in_bytes
from villa.registry import LOSSES, MODELS, OPTIMIZERS, SCHEDULERS, TRAINERS

VOCABULARY, LABELS, WIDTH = 28996, 3129, 2048
METHODS = {
    "standard": ["trainer=standard"],
    "freelb": ["trainer=freelb"],
    "villa": ["trainer=villa"],
    "villa_text": ["trainer=villa", "trainer.modality=text", "trainer.clean_loss=false"],
}
_SMALL = ["model.num_layers=1", "model.hidden_size=64", "model.num_heads=4"]


def recipe(method: str, optimizer: str, *others: str) -> RunConfig:
    """A recipe of UNITER-base with VQA's head; what it trains on is made here."""
    return load_stages(
        [
            *("model=uniter", "loss=binary_cross_entropy", f"optimizer={optimizer}", *METHODS[method]),
            *("dataset=easy_vqa", "batch.examples=1", "training.updates=2", "training.clip_norm=1", *others),
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


def train(config: RunConfig, batch: Batch, updates: int) -> None:
    """Build the model and train it on one batch."""
    model: Model = MODELS.get(config.model.name).from_config(config.model, facts())
    optimizer = OPTIMIZERS.get(config.optimizer.name)(config.optimizer).build(model)
    updater = Updater(
        *(model, LOSSES.get(config.loss.name)(config.loss), TRAINERS.get(config.trainer.name)(config.trainer)),
        *(optimizer, SCHEDULERS.get(config.scheduler.name)(config.scheduler, updates), config.training),
        precision=Precision(config.training.precision, torch.device("cpu")),
        accumulation="mean",
        seed=0,
    )
    for number in range(updates):
        updater.update(number + 1, [batch])


def measured(config: RunConfig, small: RunConfig, options: argparse.Namespace) -> int:
    """Growth of this process's resident memory to its peak, in bytes."""
    torch.set_num_threads(1)
    train(small, batch_of(2, options.tokens, options.regions), 2)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    train(config, batch_of(options.examples, options.tokens, options.regions), 2)
    return status("VmHWM") - before


def status(field: str) -> int:
    """A size of this process in bytes, from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def planned(config: RunConfig, options: argparse.Namespace) -> int:
    """The plan's peak in bytes."""
    with torch.device("meta"):
        model: Model = MODELS.get(config.model.name).from_config(config.model, facts())
    batch = batch_of(options.examples, options.tokens, options.regions)
    return round(rank_memory(count(config, model, batch), model).peak)


def case(method: str, examples: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--case", method, "--examples", str(examples)]
    command += [f"--tokens={options.tokens}", f"--regions={options.regions}", f"--optimizer={options.optimizer}"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command += options.others
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 (itself)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["standard", "freelb", "villa"])
    parser.add_argument("--examples", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--optimizer", default="bert_adamw")
    parser.add_argument("--case", choices=METHODS, help=argparse.SUPPRESS)
    options, options.others = parser.parse_known_args()
    if options.case:
        (options.examples,) = options.examples
        small, config = (recipe(options.case, options.optimizer, *more, *options.others) for more in (_SMALL, []))
        print(json.dumps({"measured": measured(config, small, options), "planned": planned(config, options)}))
        return
    print("| method | examples | measured | planned | planned / measured | s |")
    print("|---|---|---|---|---|---|")
    for method in options.methods:
        for examples in options.examples:
            started = time.perf_counter()
            found = case(method, examples, options)
            ratio, seconds = found["planned"] / found["measured"], time.perf_counter() - started
            sizes = f"{in_bytes(found['measured'])} | {in_bytes(found['planned'])}"
            print(f"| {method} | {examples} | {sizes} | {ratio:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
