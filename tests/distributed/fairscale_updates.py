"""What each process of the tests of fairscale does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import updates
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from villa.distributed.joining import joined
from villa.distributed.strategy import Strategy
from villa.errors import ConfigError

#: Like plain descent with momentum: nothing blows up rounding, and nothing hides a wrong scale of gradients.
PLAIN = {"lr": 0.5, "eps": 1.0}

#: Which cases of ``updates`` are run under a strategy with its options, and in which precision.
TRIED: dict[str, tuple[dict[str, Any], list[str], torch.dtype]] = {
    "fairscale_sdp": ({}, list(updates.CASES), torch.float64),
    "fairscale_sdp+recomputed": ({"activation_checkpointing": True}, ["villa_both_4", "bf16"], torch.float64),
    "fairscale_sdp+each_pass": ({"reduce_each_pass": True}, ["villa_both_4", "bf16"], torch.float64),
    "fairscale_fsdp": (
        {},
        [
            *("standard_2", "standard_4", "freelb_2", "freelb_4", "villa_text_4", "villa_image_detached_2"),
            *("villa_both_2", "villa_both_4", "villa_alternating_2", "villa_alternating_4", "villa_both_detached_4"),
            *("odd", "clipped", "clipped_groups", "words", "bf16", "fp16", "skipped", "adamw"),
        ],
        torch.float32,
    ),
    "fairscale_fsdp+recomputed": ({"activation_checkpointing": True}, ["villa_both_2", "bf16"], torch.float32),
    "fairscale_fsdp+each_pass": ({"reduce_each_pass": True}, ["villa_both_4", "bf16"], torch.float32),
}


def run_case(used: Strategy, case: str, dtype: torch.dtype) -> dict[str, Any]:
    """What comes out of three updates."""
    settings = {"dtype": dtype, **updates.CASES[case]}
    return updates.run(used, **(settings if "optimizer" in settings else settings | PLAIN))


def work(output: str) -> None:
    """Write what came out of everything: ``<output>.<rank>``."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined():
        for name, (options, cases, dtype) in TRIED.items():
            used = updates.connected(name.partition("+")[0], **options)
            found |= {f"{name}/{case}": run_case(used, case, dtype) for case in cases}
        for name in ("fairscale_sdp", "fairscale_fsdp"):
            used = updates.connected(name)
            found[f"{name}/held"], found[f"{name}/sent"] = _measured(used)
            found[f"{name}/earlier"] = _of_passes(used, (1, 0))
        found["fairscale_sdp/differ"] = _of_passes(used := updates.connected("fairscale_sdp"), (0, used.processes.rank))
        used = updates.connected("fairscale_fsdp")
        try:
            _of_passes(used, (0, 1 + used.processes.rank))
        except ConfigError as error:
            found["fairscale_fsdp/differ"] = str(error)
    torch.save(found, f"{output}.{used.processes.rank}")


class _Sent(TorchDispatchMode):
    """Counts messages by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d"):
            self.count[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def _measured(used: Strategy) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Elements that this process holds at the optimiser's step, and messages of an update by method."""
    sent = {}
    for trainer in ("standard", "freelb"):
        updater = updates.make(used, trainer, dtype=torch.float32)
        updates.update(updater, 1, 4)
        held: dict[str, int] = {}
        parameters = list(updater.model.parameters())
        updater.optimizer.register_step_pre_hook(
            lambda *_, p=parameters, h=held: h.update(gradients=sum(x.grad.numel() for x in p if x.grad is not None))
        )
        with _Sent() as counter:
            updates.update(updater, 2, 4)
        sent[trainer] = dict(counter.count)
    state = updater.optimizer.state_dict()["state"].values()
    held["parameters"] = sum(p.numel() for p in parameters)
    held["moments"] = sum(kept["exp_avg"].numel() for kept in state)
    held["all"] = sum(used.shape(p).numel() for p in parameters)
    return held, sent


class Branches(nn.Module):
    """Two layers, and two branches of equal size that a pass takes or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.branches = nn.ModuleDict({"1": nn.Linear(4, 4), "2": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 1)

    def forward(self, values: Tensor, branch: int) -> Tensor:
        """Score values ``[B, 4]``; branch 0 is none."""
        for layer in self.layers:
            values = layer(values)
        if branch:
            values = values + self.branches[str(branch)](values)
        return self.head(values)


def values(rank: int) -> Tensor:
    """The input of a process."""
    return torch.full((2, 4), rank + 1.0)


def step(used: Strategy, branches: tuple[int, int], inputs: list[Tensor]) -> dict[str, Tensor]:
    """Parameters after a step of plain descent on two passes of each input."""
    model: Any = Branches()
    used.apply(model)
    named = [{"params": [p], "names": [n]} for n, p in model.named_parameters()]
    optimizer = used.optimizer(lambda: torch.optim.SGD(named, lr=0.1))
    for last in (False, True):
        with used.backward(reduce=last):
            sum(model(given, branches[last]).sum() for given in inputs).backward()
    optimizer.step()
    return {name: value.clone() for name, value in used.state_dict(model).items()}


def _of_passes(used: Strategy, branches: tuple[int, int]) -> dict[str, Tensor]:
    return step(used, branches, [values(used.processes.rank)])
