"""Activation checkpointing and compilation of a model's repeated blocks.

Perturbations are added before the blocks, so that recomputation does not add them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from villa.errors import ConfigError, one_line
from villa.models.base import Model

_Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

#: Module lists with less than this share of the largest one's parameters are parts of heads and the like.
_LARGE = 0.1


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's transformer layers by name: the items of its largest module lists.

    Nested lists, and lists whose items are of different classes, do not count.
    """
    lists = {name: module for name, module in model.named_modules() if _is_stack(module)}
    outer = {name: stack for name, stack in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    largest = max((_size(stack) for stack in outer.values()), default=0)
    large = {name: stack for name, stack in outer.items() if _size(stack) >= _LARGE * largest}
    return {f"{name}.{number}": block for name, stack in large.items() for number, block in stack.named_children()}


def separate_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks, by name, that share no parameters with the rest of the model."""
    blocks = repeated_blocks(model)
    owners: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((block for block in blocks if name.startswith(f"{block}.")), "")
        owners.setdefault(parameter, set()).add(owner)
    shared = {parameter for parameter, found in owners.items() if len(found) > 1}
    return {name: block for name, block in blocks.items() if not shared.intersection(block.parameters())}


def _required_blocks(model: nn.Module, option: str, use: str) -> dict[str, nn.Module]:
    """Return the blocks that an option of ``distributed`` needs.

    Raises:
        ConfigError: the model has none.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError(
            f"distributed.{option}: {type(model).__name__} has no list of layers that could {use}; set it to false"
        )
    return blocks


def checkpoint_activations(model: Model, contexts: _Contexts = noop_context_fn) -> None:
    """Checkpoint the activations of every block: recompute it in the backward pass, with the same dropout.

    Args:
        model: changed in place.
        contexts: returns the contexts for the forward pass of a block and for its recomputation.

    Raises:
        ConfigError: the model has no blocks, or is perturbed within one.
    """
    blocks = _required_blocks(model, "activation_checkpointing", "be computed twice")
    for modality, point in model.perturbation_points().items():
        if any(f"{point.module}.".startswith(f"{name}.") for name in blocks):
            raise ConfigError(
                f"distributed.activation_checkpointing: the model is perturbed within a layer ({modality}: "
                f"{point.module}), which must not be computed twice; set it to false, or perturb the model before its "
                "layers"
            )
    for block in blocks.values():
        both = partial(_in_equal_modes, block, contexts)
        recomputed = partial(checkpoint, block.forward, use_reentrant=False, context_fn=both)
        setattr(block, "forward", recomputed)  # noqa: B010 - a method to mypy


@contextmanager
def modes(given: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Set modules to training mode (True) or evaluation mode within the context, then restore their own."""
    before = [(module, module.training) for module, _ in given]
    _set_modes(given)
    try:
        yield
    finally:
        _set_modes(before)


def _set_modes(given: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in given:
        module.training = training


def _in_equal_modes(
    block: nn.Module, contexts: _Contexts
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts in which the recomputation runs modules in the modes (dropout or not) of the first pass."""
    first, second = contexts()
    return first, _Recomputation([(module, module.training) for module in block.modules()], second)


class _Recomputation(AbstractContextManager[None]):
    """The context of a block's recomputation, entered in each backward pass through a retained graph.

    Args:
        given: modules and their modes.
        inner: another context, which may be entered more than once.
    """

    def __init__(self, given: Sequence[tuple[nn.Module, bool]], inner: AbstractContextManager[Any]) -> None:
        self._given, self._inner = given, inner
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(modes(self._given))
            stack.enter_context(self._inner)
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1 and _size(module) > 0


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


#: One program for all sequence lengths; dropout draws the same masks as without compilation.
OPTIONS: dict[str, Any] = {"dynamic": True, "options": {"fallback_random": True}}
#: Programs of a layer, of which torch allows 8: with gradients and without, of a part of the positions or of all, with
#: padding or without, of one row or several. Beyond them a layer runs as it is.
_PROGRAMS = 64


def compile_blocks(model: Model) -> None:
    """Compile the forward pass of every block, in place; equal layers share one program.

    The rest of the model, where perturbations are added and parameters gathered, is not compiled.

    Raises:
        ConfigError: the model has no blocks, or this machine cannot compile.
    """
    from torch._dynamo import config

    blocks = _required_blocks(model, "compile", "be compiled")
    config.cache_size_limit = max(config.cache_size_limit, _PROGRAMS)
    _try(next(model.parameters()).device)
    for block in blocks.values():
        setattr(block, "forward", torch.compile(block.forward, **OPTIONS))  # noqa: B010 - a method to mypy


def _try(device: torch.device) -> None:
    """Compile a sum, so that a missing compiler is reported before the run starts."""
    add: Any = torch.compile(torch.add, **OPTIONS)
    try:
        add(torch.ones(2, device=device), 1.0)
    except Exception as error:
        raise ConfigError(
            f"distributed.compile: torch.compile does not work on this machine ({one_line(error)[:200]}); install a "
            "C++ compiler (on CUDA, Triton), or set it to false"
        ) from error
