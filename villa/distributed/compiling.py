"""Compiling the layers of a model with ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch

from villa.distributed.blocks import repeated_blocks
from villa.errors import ConfigError
from villa.models.base import Model
from villa.plugins import one_line

#: One program for all lengths of batches; dropout draws what it draws without compiling.
_OPTIONS: dict[str, Any] = {"dynamic": True, "options": {"fallback_random": True}}


def compile_blocks(model: Model) -> None:
    """Compile the forward pass of every block, in place; layers that are alike share one program.

    What is around them, where perturbations are added and parameters put together, stays as it is.

    Raises:
        ConfigError: the model has no blocks, or nothing can be compiled on this machine.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError(
            f"distributed.compile: {type(model).__name__} has no list of layers that could be compiled; set it to false"
        )
    _try(next(model.parameters()).device)
    for block in blocks.values():
        setattr(block, "forward", torch.compile(block.forward, **_OPTIONS))  # noqa: B010 - a method to mypy


def _try(device: torch.device) -> None:
    """Compile a sum, so that a machine without a compiler is found before the run starts."""
    add: Any = torch.compile(torch.add, **_OPTIONS)
    try:
        add(torch.ones(2, device=device), 1.0)
    except Exception as error:
        raise ConfigError(
            f"distributed.compile: torch.compile does not work on this machine ({one_line(error)[:200]}); install a "
            "C++ compiler (on CUDA, Triton), or set it to false"
        ) from error
