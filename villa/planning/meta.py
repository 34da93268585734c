"""Run a model without its values: floating-point tensors on the meta device, integer tensors for real."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from villa.batch import Batch

#: Shape, strides and type of a tensor; None for none.
_Form = tuple[torch.Size, tuple[int, ...], torch.dtype] | None


class MetaResults:
    """Runs operations on meta tensors, with a cache of the shapes of their results.

    The shapes, strides and types of new tensors are cached. Views, which share memory with their inputs, always run;
    in-place operations keep the shape of their input and need not run.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[_Form] | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return the result of one operation, from the cache if possible."""
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


#: Types of most arguments; to look for tensors in these takes a good part of a plan.
_LEAVES = (int, float, bool, type(None))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments or the result of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) in _LEAVES:
                continue
            yield from tensors_in(item)


def _only_writes(func: Any) -> bool:
    """Return whether an operation writes into its first argument, keeping its shape, and returns that or nothing."""
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
    """Return the forms of new tensors, or None if there is anything else or memory is shared."""
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


_aten = torch.ops.aten
#: Operations whose second argument is a list of indices; a mask there makes their shape depend on its values.
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index_put)


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that runs operations, outside of torch.compile."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Let torch not wrap the mode for its compiler, whose import takes longer than a plan."""
        return False


class MetaTensors(Mode):
    """A context in which operations with a meta tensor run on the meta device, and all others for real.

    Lengths, masks and token ids are integers and stay real, so that shapes that depend on them (the longest row of a
    batch, the masked tokens) are right. They are small; all large tensors are on the meta device.

    Attributes:
        assumed: whether a value that does not exist was read (``loss.item()``) and taken to be 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = MetaResults()
        self.assumed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        named = kwargs or {}
        given = list(tensors_in((args, named)))
        if any(tensor.is_meta for tensor in given) or (not given and _on_meta(named)):
            named = named | {"generator": None} if "generator" in named else named  # meta tensors need no draws
        if func is _aten._local_scalar_dense.default and given[0].is_meta and given[0].is_floating_point():
            self.assumed = True
            return 1.0
        if func is _aten._to_copy.default and given[0].is_meta and named.get("device") is not None:
            named = named | {"device": given[0].device}
        if all(tensor.is_meta for tensor in given) and given:
            return self._results.run(func, args, named)
        if any(tensor.is_meta for tensor in given):
            return self._results.run(*_all_on_meta(func, args, named))
        if _on_meta(named) and not any(tensor.is_floating_point() for tensor in given):
            return _integers(func, args, named, made=not given)
        return func(*args, **named)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Compute shapes without torch's compiler and sympy, whose imports take longer than a plan.

    Torch's shape functions are wrapped so as not to be compiled, and allow for symbols among numbers. Within the
    context they are not, and there are none.
    """
    with ExitStack() as stack:
        for name, functions in _STAND_INS.items():
            if name not in sys.modules:
                stack.callback(_StandIn(name, functions).make_way)
        yield


class _StandIn(ModuleType):
    """A module that has a few functions of another one, and makes way for it if anything else is asked for."""

    def __init__(self, name: str, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(name)
        vars(self).update(functions)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the real module."""
        # ``inspect.getmodule`` asks all modules for their file, which is no reason to import one.
        if name == "__file__" or (name == "__path__" and self.__name__ not in _PACKAGES):
            raise AttributeError(name)
        self.make_way()
        return getattr(import_module(self.__name__), name)

    def make_way(self) -> None:
        """Remove the stand-in."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


def _as_it_is(value: Any, *_: Any, **__: Any) -> Any:
    """Return a function that shall not be compiled, or a number without symbols."""
    return value


_PACKAGES = ("sympy", "torch._dynamo")
#: Functions of a number or condition that is a symbol, or as it is.
_PLAIN = (
    "expect_true",
    "guard_int",
    "guard_or_false",
    "guard_or_true",
    "guard_size_oblivious",
    "guarding_hint_or_throw",
    "statically_known_true",
)
_STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {
    "sympy": {"Basic": type("Basic", (), {})},
    "torch._dynamo": {"disable": _as_it_is},
    "torch.utils._sympy.functions": {"Max": max},
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(_PLAIN, _as_it_is),
        "free_unbacked_symbols": lambda value: set(),
        "has_guarding_hint": lambda size: True,
        "is_nested_int": lambda size: False,
        "sym_and": lambda *conditions: all(conditions),
        "sym_eq": operator.eq,
        "sym_or": lambda *conditions: any(conditions),
    },
}


def _all_on_meta(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Turn an operation on meta and real tensors into one on the meta device."""
    if func is _aten.masked_select.default:
        func, args = _aten.index.Tensor, (args[0], [args[1]])
    if func.overloadpacket in _INDEXED:
        args = (args[0], _positions(args[1]), *args[2:])
    args, named = tree_map(without_numbers, (args, named))
    return func, args, named


def without_numbers(value: Any) -> Any:
    """Return a meta tensor with a tensor's shape, strides and type; return any other value unchanged."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def meta_batch(batch: Batch) -> Batch:
    """Return the batch with its floating-point tensors on the meta device."""
    return batch.map(lambda tensor: without_numbers(tensor) if tensor.is_floating_point() else tensor.cpu())


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace masks among indices by the positions where they are True."""
    found: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool and not index.is_meta
        found += index.nonzero(as_tuple=True) if masks and index is not None else [index]
    return found


def _on_meta(named: dict[str, Any]) -> bool:
    return named.get("device") is not None and torch.device(named["device"]).type == "meta"


def _integers(func: Callable[..., Any], args: Any, named: dict[str, Any], *, made: bool) -> Any:
    """Create integer tensors for real if they are requested on the meta device."""
    if made:
        result = func(*args, **named)
        if not isinstance(result, Tensor) or result.is_floating_point():
            return result
    dtype = named.get("dtype")
    if dtype is not None and dtype.is_floating_point:
        return func(*args, **named)
    return func(*args, **named | {"device": torch.device("cpu")})
