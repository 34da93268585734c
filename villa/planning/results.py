"""What operations return on the meta device, remembered: most of torch's rules for it are Python, and slow."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

#: Shape, strides and type of a tensor; None for none.
_Form = tuple[torch.Size, tuple[int, ...], torch.dtype] | None


class MetaResults:
    """Runs operations whose tensors are all on the meta device; the second time it knows what comes out.

    Known are the forms of new tensors. What shares memory with what is given (views) runs each time; what writes into
    it leaves its form as it is, so that nothing has to run.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[_Form] | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run one operation, or return what it would."""
        if func.is_view:
            return func(*args, **named)
        if _only_writes(func):
            return args[0] if func._schema.returns else None
        key = (func, _key(args), _key(named))
        forms = self._known.get(key)
        if forms is not None:
            return _made(forms, func)
        result = func(*args, **named)
        if key not in self._known:
            self._known[key] = _forms(result, (args, named))
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what an operation is given or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _only_writes(func: Any) -> bool:
    """Whether an operation writes into its first argument, whose form stays, and returns that or nothing."""
    schema = func._schema
    named_so = schema.is_mutable and func.overloadpacket.__name__.endswith("_")
    return named_so and len(schema.returns) < 2 and torch.Tag.inplace_view not in func.tags


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return type(value), value  # 1, 1.0 and True are equal, but not to torch


def _forms(result: Any, given: Any) -> list[_Form] | None:
    """The forms of new tensors; None where there is anything else, or memory is shared."""
    results = result if isinstance(result, list | tuple) else [result]
    if not all(each is None or isinstance(each, Tensor) for each in results):
        return None
    made = [id(tensor.untyped_storage()) for tensor in tensors_in(results)]
    if len({*made}) < len(made) or not {*made}.isdisjoint(id(t.untyped_storage()) for t in tensors_in(given)):
        return None
    return [None if each is None else (each.shape, each.stride(), each.dtype) for each in results]


def _made(forms: list[_Form], func: Any) -> Any:
    made = [None if f is None else torch.empty_strided(f[0], f[1], dtype=f[2], device="meta") for f in forms]
    if len(func._schema.returns) > 1:
        return tuple(made)
    return made if isinstance(func._schema.returns[0].type, torch.ListType) else made[0]
