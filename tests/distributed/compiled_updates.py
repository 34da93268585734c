"""What each process of the tests of compiled layers does."""

from __future__ import annotations

from typing import Any

import fairscale_updates
import torch
import updates

from villa.distributed.joining import joined

STRATEGIES = ("ddp", "fsdp", "fairscale_fsdp", "fairscale_sdp")
#: Two backward passes a view, and lengths that differ between micro-batches.
CASE = "villa_both_4"


def work(output: str) -> None:
    """Three updates under every strategy with compiled layers. Rank 0 writes what came out of them."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined():
        for name in STRATEGIES:
            used = updates.connected(name, compile=True)
            found[name] = fairscale_updates.run_case(used, CASE, torch.float32)
    if used.processes.is_main:
        torch.save(found, output)
