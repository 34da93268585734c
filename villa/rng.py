"""Randomness: every seed derives from integers and strings, so that resuming needs no generator state."""

from __future__ import annotations

import hashlib

import torch

#: The rank in keys of earlier single-process versions, kept so that their runs resume unchanged.
_FIRST = 0


def derive_seed(*parts: int | str) -> int:
    """Hash ``parts`` to a seed in [0, 2^63), the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_pass(seed: int, update: int, micro_batch: int, pass_index: int) -> None:
    """Seed torch's generators before a forward pass (dropout and other draws inside the model).

    Args:
        seed: the run's seed.
        update: the optimiser step, from 1.
        micro_batch: position of the micro-batch within the update, whichever process runs it.
        pass_index: passes with equal indices draw equal dropout masks.
    """
    value = derive_seed("pass", seed, _FIRST, update, micro_batch, pass_index)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # do not initialise CUDA just for this
        torch.cuda.manual_seed(value)


def micro_batch_seed(seed: int, update: int, micro_batch: int, name: str) -> int:
    """Return the seed of a micro-batch's draws called ``name``, whichever process runs it."""
    return derive_seed(seed, _FIRST, update, micro_batch, name)


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded with ``derive_seed(*parts)``, for explicit draws."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))
