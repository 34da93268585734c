"""What each process of the tests of compiled layers does."""

from __future__ import annotations

from typing import Any

import fairscale_updates
import torch
import updates

from villa.distributed.joining import joined
from villa.distributed.strategy import Strategy

#: Strategies, and the precision of each: fairscale's FSDP has float32 alone.
DTYPES = {"ddp": torch.float64, "fsdp": torch.float64, "fairscale_sdp": torch.float64, "fairscale_fsdp": torch.float32}
#: Two backward passes a view, and lengths that differ between micro-batches.
CASE = "villa_both_4"


def run(used: Strategy, name: str) -> dict[str, Any]:
    """What comes out of three updates, with the settings of the tests of that strategy."""
    if name.startswith("fairscale"):
        return fairscale_updates.run_case(used, CASE, DTYPES[name])
    return updates.run(used, **updates.CASES[CASE])


def work(output: str) -> None:
    """Three updates under every strategy with compiled layers. Rank 0 writes what came out of them."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined():
        for name in DTYPES:
            used = updates.connected(name, compile=True)
            found[name] = run(used, name)
    if used.processes.is_main:
        torch.save(found, output)
