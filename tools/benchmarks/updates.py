"""Time, FLOPs and memory of whole updates of UNITER against the published ones, written plainly (``reference.py``).

    python tools/benchmarks/updates.py                                  # a small model, five methods: a minute
    python tools/benchmarks/updates.py --size base --threads 1 2       # UNITER-base: half an hour
    python tools/benchmarks/updates.py --size base --against ../older  # and against another checkout of villa
    python tools/benchmarks/updates.py --check                          # gradients are equal without dropout

An update has all passes of a micro-batch, clipping and the optimiser's step. Each contestant runs in a process of its
own; all take turns, update by update, and ratios are medians over the rounds, so that a machine whose speed drifts does
not matter. Columns: the contestant's time over that of the reference, on the clock and in CPU time; its time and FLOPs;
the FLOPs over those of the reference; its FLOPs a second over those of single matrix products of its shapes, measured
between the rounds; and the growth of its resident memory to the peak (Linux).
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reference import (
    BETAS,
    CLIP_NORM,
    EPSILON,
    LEARNING_RATE,
    STEP_SIZE,
    STEPS,
    TASKS,
    VIEWS,
    WEIGHT_DECAY,
    PlainAdamW,
    PlainUniter,
    rows_of,
)
from reference import backward as reference_backward
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from villa.batch import Batch

#: Updates before those that are timed: the first makes the optimiser's state, and the second finds its memory taken.
_WARM_UP = 2
#: Layers, hidden size, heads, vocabulary, feature width and labels.
SIZES = {
    "tiny": (2, 32, 2, 200, 48, 13),
    "small": (4, 128, 4, 8000, 1280, 512),
    "base-2": (2, 768, 12, 28996, 2048, 3129),
    "base-4": (4, 768, 12, 28996, 2048, 3129),
    "base": (12, 768, 12, 28996, 2048, 3129),
}
_TRAINERS = {
    "standard": ["trainer=standard"],
    "freelb": ["trainer=freelb", "trainer.init=zero", "trainer.modality=both"],
    **{
        m: ["trainer=villa", "trainer.reference=official", f"trainer.modality={m}"]
        for m in ("text", "both", "alternating")
    },
    # The clean pass is the first perturbed one; the reference stays the published loop.
    **{
        f"{m}_fast": ["trainer=villa", "trainer.reference=official", f"trainer.modality={m}", "trainer.dropout=shared"]
        for m in ("text", "both", "alternating")
    },
}
#: Head and loss of the tasks.
_HEADS = {
    "vqa": ("classification", "binary_cross_entropy"),
    "vcr": ("multiple_choice", "cross_entropy"),
    "nlvr2": ("nlvr2_paired", "cross_entropy"),
}
_OURS = {
    "optimizer.lr": LEARNING_RATE,
    "optimizer.betas": list(BETAS),
    "optimizer.eps": EPSILON,
    "optimizer.weight_decay": WEIGHT_DECAY,
    "optimizer.grouping": "released",
    "training.clip_norm": CLIP_NORM,
    "scheduler": "constant",
}


def batch_of(case: argparse.Namespace) -> Batch:
    """A random batch in which a share of the positions of the longest row's rectangle is padding."""
    _, _, _, vocabulary, width, labels = SIZES[case.size]
    torch.manual_seed(1)
    examples, tokens, regions = case.examples, case.tokens, case.regions
    texts, images = (examples * each for each in TASKS[case.task])
    words, seen = (
        ((1 - 2 * case.padding * torch.linspace(0, 1, count)) * most).round().clamp(min=2).long()
        for count, most in ((texts, tokens), (images, regions))
    )
    masks = torch.arange(tokens) < words[:, None], torch.arange(regions) < seen[:, None]
    corners = torch.rand(images, regions, 4)
    shown = {
        "input_ids": torch.randint(1, vocabulary, (texts, tokens)) * masks[0],
        "attention_mask": masks[0],
        "features": torch.randn(images, regions, width) * masks[1].unsqueeze(-1),
        "boxes": torch.cat((corners[..., :2] / 2, 0.5 + corners[..., 2:] / 2), dim=-1),
        "region_mask": masks[1],
    }
    shown = {
        name: value if len(value) == examples else value.unflatten(0, (examples, -1)) for name, value in shown.items()
    }
    soft = torch.rand(examples, labels) * (torch.rand(examples, labels) < 0.01)
    classes = torch.randint(2, (examples, TASKS[case.task][0]))
    return Batch([str(n) for n in range(examples)], **shown, targets=soft if case.task == "vqa" else classes)


def model_of(case: argparse.Namespace) -> tuple[Any, Any]:
    """The recipe and the model, with the same weights in every process."""
    from villa.config import load_stages
    from villa.models.base import DataFacts
    from villa.registry import MODELS

    layers, hidden, heads, vocabulary, width, labels = SIZES[case.size]
    head, loss = _HEADS[case.task]
    rates = [f"model.{kind}_dropout={case.dropout}" for kind in ("hidden", "attention")]
    options = [f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"model.num_heads={heads}", *rates]
    trainer = [*_TRAINERS[case.method], *(f"trainer.{m}_step_size={STEP_SIZE}" for m in ("text", "image"))]
    config = load_stages(
        [
            *(
                "model=uniter",
                f"model.head={head}",
                f"loss={loss}",
                "optimizer=bert_adamw",
                "dataset=easy_vqa",
                "batch.examples=1",
            ),
            *("training.updates=1000", f"training.precision={case.dtype}", *options),
            *(trainer if case.method != "standard" else trainer[:1]),
            *([] if case.method == "standard" else [f"trainer.steps={STEPS}"]),
            *(f"{name}={value}" for name, value in _OURS.items()),
            *case.options,
        ]
    )[0].config
    torch.manual_seed(0)
    facts = DataFacts(vocab_size=vocabulary, num_labels=labels if case.task == "vqa" else None, feature_dim=width)
    return config, MODELS.get("uniter").from_config(config.model, facts).train()


def villa_update(case: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    """The model and its update, by the checkout of villa that is imported."""
    from villa.distributed.strategy import Strategy
    from villa.engine.passes import ModelPasses, Precision
    from villa.engine.updater import Updater
    from villa.registry import LOSSES, OPTIMIZERS, SCHEDULERS, TRAINERS

    with suppress(ImportError):  # older checkouts have no such thing
        from villa.engine.run import keep_freed_memory

        keep_freed_memory()  # as villa_run does
    config, model = model_of(case)
    loss = LOSSES.get(config.loss.name)(config.loss)
    precision, strategy = Precision(case.dtype, torch.device("cpu")), Strategy()
    given = {
        **{
            "model": model,
            "loss": loss,
            "precision": precision,
            "seed": 0,
            "strategy": strategy,
            "accumulation": "mean",
        },
        "passes": ModelPasses(model, loss, precision, 0, strategy),
        "trainer": TRAINERS.get(config.trainer.name)(config.trainer),
        "optimizer": OPTIMIZERS.get(config.optimizer.name)(config.optimizer).build(model),
        "schedule": SCHEDULERS.get(config.scheduler.name)(config.scheduler, 1000),
        "config": config.training,
    }
    updater = Updater(**{name: given[name] for name in inspect.signature(Updater).parameters})
    batch, numbers = batch_of(case), itertools.count(1)
    return model, lambda: updater.update(next(numbers), [batch])


def reference_update(case: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    """The same weights and batch, by the plain loop."""
    _, model = model_of(case)
    parameters, batch = dict(model.named_parameters()), rows_of(batch_of(case))
    plain, optimizer = PlainUniter(parameters, SIZES[case.size][2], case.dropout), PlainAdamW(parameters)

    def score(*given: Any, **named: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
            return plain(*given, **named).float()

    score.width = SIZES[case.size][1]  # type: ignore[attr-defined]

    def update() -> None:
        reference_backward(score, batch, case.method.removesuffix("_fast"))
        optimizer.step()

    return model, update


def serve(case: argparse.Namespace) -> None:
    """Answer the commands of the main process, a line each, with a line of JSON."""
    torch.set_num_threads(case.threads)
    out, sys.stdout = sys.stdout, sys.stderr
    before = _status("VmRSS")
    model, update = {"reference": reference_update}.get(case.serve, villa_update)(case)
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        found: Any = None
        if command == "update":
            clock, cpu = time.perf_counter(), time.process_time()
            update()
            found = time.perf_counter() - clock, time.process_time() - cpu
        elif command == "flops":
            with FlopCounterMode(display=False) as counter:
                update()
            found = counter.get_total_flops()
        elif command == "gradients":
            torch.save(_gradients(model, update), path)
        elif command == "memory":
            found = _status("VmHWM") - before
        print(json.dumps(found), file=out, flush=True)


def _gradients(model: Any, update: Callable[[], None]) -> dict[str, Tensor]:
    """What an update's passes add up to, before clipping."""
    found: dict[str, Tensor] = {}

    def keep(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()

    hooks = [p.register_post_accumulate_grad_hook(partial(keep, name)) for name, p in model.named_parameters()]
    update()
    for hook in hooks:
        hook.remove()
    return found


def _status(field: str) -> int:
    """A size of this process in bytes; 0 where the system does not say."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


class Contestant:
    """A process that updates a model when told to."""

    def __init__(self, name: str, checkout: Path, case: argparse.Namespace) -> None:
        self.name = name
        self.times: list[tuple[float, float]] = []
        options = (f"--{key}={value}" for key, value in vars(case).items() if key not in ("options", "serve"))
        command = [sys.executable, __file__, *case.options, *options, f"--serve={name}"]
        place = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(case.threads)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=place, stdin=pipe, stdout=pipe, text=True)  # noqa: S603 (itself)

    def ask(self, command: str) -> Any:
        """Send a command, and wait for the answer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            print(command, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} failed at '{command}' with status {process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def contestants(case: argparse.Namespace, against: Path | None) -> Iterator[list[Contestant]]:
    """The reference, this checkout and perhaps another one, started and, in the end, ended."""
    own = Path(__file__).resolve().parents[2]
    checkouts = {"reference": own, "villa": own} | ({"against": against.resolve()} if against else {})
    started = [Contestant(name, checkout, case) for name, checkout in checkouts.items()]
    try:
        yield started
    finally:
        for contestant in started:
            contestant.end()


def peak(case: argparse.Namespace) -> float:
    """FLOPs a second of the fastest of the layers' matrix products on the real positions."""
    _, hidden, *_ = SIZES[case.size]
    rows = round(case.examples * max(TASKS[case.task]) * (case.tokens + case.regions) * (1 - case.padding))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    best = 0.0
    for inner, outer in ((hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)):
        left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
        repeats = max(1, round(2e9 / (rows * inner * outer)))
        started = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(left, right)
        best = max(best, 2 * rows * inner * outer * repeats / (time.perf_counter() - started))
    return best


def compare(case: argparse.Namespace, rounds: int, against: Path | None) -> None:
    """Time the contestants of one case in turn, and print their rows."""
    torch.set_num_threads(case.threads)
    with contestants(case, against) as found:
        for contestant in found * _WARM_UP:
            contestant.ask("update")
        peaks = []
        for _ in range(rounds):
            for contestant in found:
                contestant.times.append(contestant.ask("update"))
            peaks.append(peak(case))
        flops = {contestant.name: contestant.ask("flops") for contestant in found}
        base, reached = found[0], statistics.median(peaks)
        for contestant in found:
            pairs = list(zip(contestant.times, base.times, strict=True))
            clock, cpu = (statistics.median(own[i] / its[i] for own, its in pairs) for i in (0, 1))
            seconds, counted = statistics.median(t for t, _ in contestant.times), flops[contestant.name]
            memory = contestant.ask("memory") / 2**20
            print(
                f"| {case.size} | {case.method} | {case.dtype} | {case.padding} | {case.threads} | {contestant.name} | "
                f"{clock:.2f} | {cpu:.2f} | {1e3 * seconds:.1f} | {counted / 1e9:.3g} | "
                f"{counted / flops[base.name]:.2f} | {counted / seconds / reached:.0%} | {memory:.0f} |",
                flush=True,
            )


def check(case: argparse.Namespace, against: Path | None) -> None:
    """Print how far the gradients of an update are from those of the reference."""
    torch.set_num_threads(case.threads)
    with contestants(case, against) as found, tempfile.TemporaryDirectory() as folder:
        gradients = []
        for contestant in found:
            contestant.ask(f"gradients {folder}/gradients.pt")
            gradients.append(torch.load(f"{folder}/gradients.pt"))
        wanted = gradients[0]
        norm = torch.stack([g.double().norm() for g in wanted.values()]).norm()
        for contestant, given in zip(found[1:], gradients[1:], strict=True):
            zero = torch.zeros(())
            apart = [(given.get(n, zero) - wanted.get(n, zero)).double().norm() for n in given.keys() | wanted.keys()]
            difference = torch.stack(apart).norm() / norm
            print(
                f"| {case.size} | {case.method} | {case.padding} | {contestant.name} | {difference:.1e} |", flush=True
            )


def main() -> None:
    """Measure and print a Markdown table."""
    options = _parse()
    if options.serve:
        (size,), (method,), (dtype,) = options.size, options.method, options.dtype
        (padding,), (threads,) = options.padding, options.threads
        case = {"size": size, "method": method, "dtype": dtype, "padding": padding, "threads": threads}
        serve(argparse.Namespace(**vars(options) | case))
        return
    if options.check:
        print("| size | method | padding | | gradients differ by (relative norm) |\n|---|---|---|---|---|")
    else:
        print("| size | method | type | padding | threads | | clock | CPU | ms | GFLOP | FLOPs | of peak | MiB |")
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    lists = (options.size, options.method, options.dtype, options.padding, options.threads)
    for size, method, dtype, padding, threads in itertools.product(*lists):
        case = argparse.Namespace(
            **{"size": size, "method": method, "dtype": dtype, "padding": padding, "threads": threads},
            **{name: getattr(options, name) for name in ("task", "examples", "tokens", "regions", "options")},
            dropout=0.0 if options.check else options.dropout,
        )
        if options.check:
            check(case, options.against)
        else:
            compare(case, options.rounds, options.against)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--method", nargs="+", choices=_TRAINERS, default=list(VIEWS))
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--padding", nargs="+", type=float, default=[0.2], help="share of positions, below 0.5")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--task", choices=TASKS, default="vqa", help="texts and images of an example, and the head")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20, help="of the longest text")
    parser.add_argument("--regions", type=int, default=50, help="of the largest image")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of villa")
    parser.add_argument("--check", action="store_true", help="compare gradients without dropout instead")
    parser.add_argument("--serve", choices=("reference", "villa", "against"), help=argparse.SUPPRESS)
    options, options_of_model = parser.parse_known_args()
    options.options = options_of_model
    return options


if __name__ == "__main__":
    main()
