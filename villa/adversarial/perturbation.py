"""One modality's perturbation over the passes of one micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from villa.adversarial.ascent import AscentSettings, Bounds, ascend, direction, flat_norm, initialise, row_norm
from villa.errors import ConfigError
from villa.facts import PixelScale


class Perturbation:
    """A perturbation that is initialised in its first forward pass and moves between passes.

    It is initialised inside the model's own forward, where the embedding exists: sharded models do not allow calling
    a submodule from outside.

    Args:
        settings: initialisation and ascent.
        seed: seed of the random start.
        initial: ``[rows, tokens, width]`` tensor to start from instead.

    Attributes:
        delta: the value that the next pass adds; None before the first pass. Of pixels, it is in units of colour.
        relative_sizes: ||delta|| / ||embedding|| of every row (l2): delta of the last pass, embedding of the first.
        gradient_norm: mean over rows of the gradient's norm, set by the ascent step.
        calls: how often the pass has added it.
        frozen: whether the perturbation needs no gradient.
        mask: ``[rows, tokens]`` bool, True where the perturbation may be non-zero in this pass; None for everywhere.
        unit: unit of all sizes, that of the first pass, broadcast to ``delta``; None for 1.
        bounds: smallest and largest values, of pixels; None for none.
    """

    def __init__(self, settings: AscentSettings, seed: int = 0, *, initial: Tensor | None = None) -> None:
        self.settings = settings
        self.seed = seed
        self.delta = None if initial is None else initial.detach()
        self.calls = 0
        self.frozen = False
        self.relative_sizes: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.mask: Tensor | None = None
        self.unit: Tensor | None = None
        self._scale: PixelScale | None = None
        self._lengths: Tensor | None = None
        self.bounds: Bounds | None = None
        self._direction: Tensor | None = None

    def begin(self, mask: Tensor | None, *, confined: bool = False, scale: PixelScale | None = None) -> None:
        """Prepare a forward pass with the given ``[rows, tokens]`` mask; see ``Point.confined`` and ``Point.scale``."""
        self.calls = 0
        self.mask = mask if self.settings.mask_padding or confined else None
        self._scale = scale

    def apply(self, embedding: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the perturbed embedding in its own dtype; the sum is computed in fp32 or wider.

        Args:
            embedding: ``[rows, tokens, width]``.
            table: ``[entries, width]`` weight that it was looked up in, if it was.
        """
        self.calls += 1
        if self._lengths is None:
            self._lengths = self._first_pass(embedding.detach(), table)
        assert self.delta is not None
        delta = self.delta.detach() if self.delta.requires_grad else self.delta  # a leaf without a gradient yet
        self.gradient_norm, self.relative_sizes = None, flat_norm(delta, "l2") / self._lengths
        self.delta = delta.requires_grad_(not self.frozen)
        if self._scale is not None:
            return _recoloured(embedding, delta, self._scale).to(embedding.dtype)
        moved = embedding + delta
        return moved if moved.dtype == embedding.dtype else moved.to(embedding.dtype)

    def _first_pass(self, values: Tensor, table: Tensor | None) -> Tensor:
        """Set unit, bounds and ``delta`` for what is perturbed; return the norms ``[rows]`` of its unmasked part."""
        if self._scale is not None:
            values = _colours(values, self._scale)
            self.bounds = (-values).clamp_max(0), (1 - values).clamp_min(0)
        if self.mask is not None and self.mask.shape != values.shape[:2]:
            raise ConfigError(
                f"a perturbation point has values of shape {list(values.shape)}, which are not those of tokens "
                f"{list(self.mask.shape)}: choose a point where the model has a position for each of them"
            )
        if self.unit is None and (self.settings.relative_to != "none" or self.settings.channels):
            self.unit = self._measure_unit(values, table)
        if self.delta is None:
            self.delta = self.start(values)
        lengths = torch.linalg.vector_norm(values, dim=-1, dtype=torch.promote_types(values.dtype, torch.float32))
        if self.mask is not None:
            lengths = lengths * self.mask
        return flat_norm(lengths, "l2").clamp_min(1e-12)

    def start(self, values: Tensor) -> Tensor:
        """Return the first perturbation of ``values [rows, tokens, width]``."""
        return initialise(values, self.settings, self.mask, self.seed, self.unit, self.bounds)

    @property
    def relative_size(self) -> Tensor | None:
        """Mean over rows of ``relative_sizes``."""
        return None if self.relative_sizes is None else self.relative_sizes.mean()

    def trained(self) -> Tensor:
        """Return the value added by the last pass, as a leaf to differentiate a loss by.

        Raises:
            RuntimeError: no pass has added the perturbation, or it is frozen.
        """
        if self.delta is None or not self.delta.requires_grad:
            reason = "it is frozen" if self.frozen else "no forward pass has added it since it last moved"
            raise RuntimeError(f"a perturbation has no gradient: {reason}")
        return self.delta

    def ascend(self, gradient_scale: float = 1.0) -> None:
        """Take an ascent step along the gradient of ``delta``.

        Args:
            gradient_scale: factor on the gradients (loss scale x micro-batch weight).

        Raises:
            RuntimeError: there is no gradient: the loss does not depend on the perturbed value.
        """
        if self.delta is None or self.delta.grad is None:
            raise RuntimeError("the perturbation has no gradient: the loss does not depend on its point")
        gradient = self.delta.grad if gradient_scale == 1.0 else self.delta.grad / gradient_scale
        self.gradient_norm = flat_norm(gradient, self.settings.norm).mean()
        if self.settings.momentum:
            gradient = self._direction = direction(gradient, self._direction, self.settings, self.mask)
        self.delta = ascend(self.delta.detach(), gradient, self.settings, self.mask, self.unit, self.bounds)

    def _measure_unit(self, embedding: Tensor, table: Tensor | None) -> Tensor:
        """Return the unit of all sizes, which stays that of the first pass."""
        settings = self.settings
        if settings.channels is not None:
            factors = torch.tensor(settings.channels, dtype=embedding.dtype, device=embedding.device)
            if settings.relative_to == "none":
                return factors
            return factors * self._norm(embedding)
        if settings.relative_to == "table":
            if table is None:
                raise RuntimeError("relative_to=table: the perturbed value is not looked up in a table")
            norms: Tensor = torch.linalg.vector_norm(table.detach().float(), dim=-1)
            return norms.mean()
        return self._norm(embedding)

    def _norm(self, embedding: Tensor) -> Tensor:
        """Return the norm of what is perturbed, of each row or token."""
        if self.mask is not None:
            embedding = embedding * self.mask.unsqueeze(-1)
        wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        return row_norm(wide, self.settings.norm, self.settings.scope)


def _coding(values: Tensor, scale: PixelScale) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the channels, ``[width]`` each, in fp32 or wider."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return (
        torch.tensor(scale.mean, dtype=dtype, device=values.device),
        torch.tensor(scale.std, dtype=dtype, device=values.device),
    )


def _colours(values: Tensor, scale: PixelScale) -> Tensor:
    """Return the colours of pixel values ``[rows, pixels, channels]``."""
    mean, std = _coding(values, scale)
    return values * std + mean


def _recoloured(values: Tensor, delta: Tensor, scale: PixelScale) -> Tensor:
    """Return pixel values with ``delta`` added to their colours.

    They stay between those of the colours 0 and 1 to the bit, or the given values where these lie beyond. The gradient
    is that of the sum: a pixel at its bound can still move back.
    """
    mean, std = _coding(values, scale)
    moved = values + delta / std
    lowest, highest = torch.minimum(-mean / std, values), torch.maximum((1 - mean) / std, values)
    return moved + (moved.clamp(lowest, highest) - moved).detach()
