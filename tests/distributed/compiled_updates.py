"""What each process of the tests of compiled layers does."""

from __future__ import annotations

from typing import Any

import fairscale_updates
import torch
import updates
from strangers import AscendingVilla
from torch import Tensor

from villa.distributed.blocks import OPTIONS
from villa.distributed.joining import joined
from villa.distributed.strategy import Strategy
from villa.models.dropout import dropout
from villa.trainers.villa import VillaConfig

#: Strategies, and the precision of each: fairscale's FSDP has float32 alone.
DTYPES = {"ddp": torch.float64, "fsdp": torch.float64, "fairscale_sdp": torch.float64, "fairscale_fsdp": torch.float32}
#: Two backward passes a view, and lengths that differ between micro-batches.
CASE = "villa_both_4"
#: That of one process, for which C++ is compiled: 1.5 s a kernel.
ALONE: dict[str, Any] = {"trainer": "standard", "count": 4, "even": True}


def options(name: str) -> dict[str, Any]:
    """Options of ``updates.run`` under a strategy; layers would be compiled again for a micro-batch of one row."""
    plain = fairscale_updates.PLAIN if name.startswith("fairscale") else {}
    return {"count": updates.CASES[CASE]["count"], "even": True, "dtype": DTYPES[name], **plain}


def run(used: Strategy, name: str) -> dict[str, Any]:
    """What comes out of three updates, with the settings of the tests of that strategy."""
    return updates.run(used, updates.CASES[CASE]["trainer"], **options(name))


def ascending(used: Strategy, name: str) -> dict[str, Any]:
    """The same with ascents alone before each micro-batch, whose perturbations are there, too."""
    trainer = AscendingVilla(VillaConfig(**updates.TRAINERS_TRIED["villa_both"]))
    result = updates.run(used, trainer, **options(name))
    return result | {"deltas": [each for of in trainer.found for each in of]}


def _set_up() -> None:
    import torch._dynamo.config
    import torch._inductor.config

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # no further processes, each of which imports torch
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def work(output: str) -> None:
    """Three updates under every strategy with compiled layers. Rank 0 writes what came out of them.

    Strategies meet what is traced, with its gradients. The C++ code generated from that does not depend on them; to
    compile it takes minutes.
    """
    _set_up()
    OPTIONS.clear()
    OPTIONS.update(dynamic=True, backend="aot_eager")
    found: dict[str, Any] = {}
    with joined():
        for name in DTYPES:
            used = updates.connected(name, compile=True)
            found[name] = ascending(used, name)
    if used.processes.is_main:
        torch.save(found, output)


def masks() -> list[dict[str, Tensor]]:
    """Dropout twice after another and its gradients, as they are and compiled into one program."""
    values = torch.randn(7, 33, dtype=torch.float64, requires_grad=True)

    def twice(values: Tensor) -> Tensor:
        return dropout(dropout(values, 0.3) + dropout(values, 0.3), 0.5)

    found = []
    for function in (twice, torch.compile(twice, fullgraph=True, **OPTIONS)):
        torch.manual_seed(3)
        dropped = function(values)
        (gradient,) = torch.autograd.grad(dropped.sum(), values)
        found.append({"values": dropped.detach(), "gradient": gradient, "next": torch.rand(1)})
    return found


def work_alone(output: str) -> None:
    """Three updates of one process with compiled layers, each computed twice; write the parameters after them."""
    _set_up()
    used = updates.connected("single", compile=True, activation_checkpointing=True)
    parameters = updates.run(used, **ALONE)["parameters"]
    torch.save({"parameters": parameters, "masks": masks()}, output)
