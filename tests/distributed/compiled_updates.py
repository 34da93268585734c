"""What each process of the tests of compiled layers does."""

from __future__ import annotations

from typing import Any

import fairscale_updates
import torch
import updates
from strangers import AscendingVilla

from villa.distributed.joining import joined
from villa.distributed.strategy import Strategy
from villa.trainers.villa import VillaConfig

#: Strategies, and the precision of each: fairscale's FSDP has float32 alone.
DTYPES = {"ddp": torch.float64, "fsdp": torch.float64, "fairscale_sdp": torch.float64, "fairscale_fsdp": torch.float32}
#: Two backward passes a view, and lengths that differ between micro-batches.
CASE = "villa_both_4"


def run(used: Strategy, name: str) -> dict[str, Any]:
    """What comes out of three updates, with the settings of the tests of that strategy."""
    if name.startswith("fairscale"):
        return fairscale_updates.run_case(used, CASE, DTYPES[name])
    return updates.run(used, **updates.CASES[CASE])


def ascending(used: Strategy, name: str) -> dict[str, Any]:
    """The same with ascents alone before each micro-batch, whose perturbations are there, too."""
    trainer = AscendingVilla(VillaConfig(**updates.TRAINERS_TRIED["villa_both"]))
    options = {"dtype": DTYPES[name], **(fairscale_updates.PLAIN if name.startswith("fairscale") else {})}
    result = updates.run(used, trainer, count=updates.CASES[CASE]["count"], **options)
    return result | {"deltas": [each for of in trainer.found for each in of]}


def work(output: str) -> None:
    """Three updates under every strategy with compiled layers. Rank 0 writes what came out of them."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined():
        for name in DTYPES:
            used = updates.connected(name, compile=True)
            found[name] = ascending(used, name)
    if used.processes.is_main:
        torch.save(found, output)


def work_alone(output: str) -> None:
    """Three updates of one process with compiled layers, each computed twice; write the parameters after them."""
    torch.set_num_threads(1)
    used = updates.connected("single", compile=True, activation_checkpointing=True)
    torch.save(updates.run(used, **updates.CASES[CASE])["parameters"], output)
