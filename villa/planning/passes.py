"""The passes that a trainer gets for planning, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.config.schema import DistributedConfig
from villa.distributed.blocks import checkpoint_activations, repeated_blocks
from villa.engine.passes import AUTOCAST, ModelPasses, Precision, PrecisionName
from villa.losses.base import Loss
from villa.models.base import Model, ModelOutput
from villa.models.dropout import PLANNED

#: Functions that autocast runs in the lower precision, and those in fp32 (PyTorch's documentation of autocast), as far
#: as models call them; all others run in the type of their arguments.
_LOWER: tuple[Callable[..., Any], ...] = (
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
)
_FP32: tuple[Callable[..., Any], ...] = (F.layer_norm, F.softmax, F.log_softmax, torch.softmax, Tensor.softmax)


class Kernels(TorchFunctionMode):
    """A context in which functions save for the backward pass what a device's kernels would save.

    - CUDA: dropout saves its mask in bytes, and attention no maps (the memory-efficient kernel).
    - CPU: attention without dropout saves no maps (the flash kernel); with dropout it does.

    Autocast does nothing on the meta device, so its casts are made here whenever autocast of the CPU is enabled.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda = device == "cuda"
        self._weights: dict[Tensor, Tensor] | None = None
        self._before: list[tuple[type[torch.autocast], type[torch.Generator]]] = []

    def __enter__(self) -> Kernels:
        """Redirect autocast and generators of the meta device to the CPU; contexts may be nested."""
        self._before.append((torch.autocast, torch.Generator))
        _replace(_Autocast, _Generator)
        PLANNED.append("cuda" if self._cuda else "cpu")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Undo ``__enter__``."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        PLANNED.pop()
        _replace(*self._before.pop())

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Cast each weight once within the context, as autocast does."""
        self._weights = {}
        try:
            yield
        finally:
            self._weights = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        named = kwargs or {}
        if (func in _LOWER or func in _FP32) and torch.is_autocast_enabled("cpu"):
            args, named = tree_map(self._lower if func in _LOWER else _widened, (args, named))
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **named)
        if func is F.dropout and self._cuda:
            return _dropout(*args, **named)
        return func(*args, **named)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        dtype = torch.get_autocast_dtype("cpu")
        if self._weights is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if value not in self._weights:
            self._weights[value] = value.to(dtype)
        return self._weights[value]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **others: Any,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        plain = query.dim() == 4 and key.shape[1] == query.shape[1] and not others.get("enable_gqa")
        causal, scale = bool(others.get("is_causal")), others.get("scale")
        if plain and self._cuda:
            if attn_mask is not None:
                attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            return kernel(query, key, value, attn_mask, True, dropout_p, causal, scale=scale)[0]  # type: ignore[no-any-return]
        if plain and dropout_p == 0:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return flash(query, key, value, 0.0, causal, attn_mask=attn_mask, scale=scale)[0]  # type: ignore[no-any-return]
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **others)


class _Autocast(torch.autocast):
    """Autocast that treats the meta device as the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


class _Generator(torch.Generator):
    """A generator that treats the meta device as the CPU."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == "meta" else device)  # type: ignore[call-arg]


def _replace(autocast: type[torch.autocast], generator: type[torch.Generator]) -> None:
    for module in (torch, torch.amp):
        vars(module)["autocast"] = autocast
    vars(torch)["Generator"] = generator


def _widened(value: Any) -> Any:
    lower = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if lower else value


def _dropout(given: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return given
    return torch.native_dropout(given, p, True)[0]


class PlannedPasses(ModelPasses):
    """The passes of one micro-batch on the meta device, counted.

    Args:
        model: the model, on the meta device.
        loss: the task loss.
        precision: the run's precision.
        device: type of the device whose kernels are assumed.

    Attributes:
        kernels: the context to run in.
        backwards: backward passes so far.
        forwards: forward passes so far.
        uses: how often every layer was used so far: once per forward pass, and once more if that has a graph.
    """

    def __init__(self, model: Model, loss: Loss, precision: PrecisionName, device: str) -> None:
        self.kernels = Kernels(device)
        super().__init__(model, loss, _PlannedPrecision(precision, self.kernels), 0)
        self.backwards = self.uses = self.forwards = 0
        self.begin(1, 0, 1.0)

    def forward(
        self,
        batch: Batch,
        perturbations: Mapping[str, Perturbation] | None = None,
        *,
        index: int = 0,
        grad: bool = True,
        train: bool = True,
    ) -> ModelOutput:
        """Run the model, and count the pass."""
        self.forwards += 1
        self.uses += 1 + grad
        return super().forward(batch, perturbations, index=index, grad=grad, train=train)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate, and count the pass."""
        self.backwards += 1
        super().backward(loss, last=last)

    def _warn_of_size(self, perturbations: Mapping[str, Perturbation], *, train: bool) -> None:
        """Do nothing: perturbations on the meta device have no size."""


@contextmanager
def layers_as(config: DistributedConfig, model: Model, kernels: Kernels) -> Iterator[None]:
    """Within the context, layers save activations as the recipe says, without the wrappers of a strategy.

    Layers recomputed in the backward pass, which is outside of the kernels' context, enter it here. Compiled layers are
    planned as if uncompiled.

    Raises:
        ConfigError: the model does not support ``activation_checkpointing``.
    """
    blocks = repeated_blocks(model).values()
    for block in blocks:
        vars(block).pop("forward", None)
    if config.activation_checkpointing:
        checkpoint_activations(model, lambda: (nullcontext(), kernels))
    try:
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


class _PlannedPrecision(Precision):
    """The run's autocast, which ``Kernels`` emulates, without loss scaling."""

    def __init__(self, name: PrecisionName, kernels: Kernels) -> None:
        super().__init__("fp32", torch.device("cpu"))
        self.dtype = AUTOCAST.get(name)
        self._kernels = kernels

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Return a context with autocast and its cache of weights."""
        with super().autocast(), self._kernels.caching():
            yield
