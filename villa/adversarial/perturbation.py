"""One modality's perturbation over the passes of one micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from villa.adversarial.ascent import AscentSettings, ascend, flat_norm, initialise, row_norm


class Perturbation:
    """A perturbation that is initialised in its first forward pass and moves between passes.

    It is initialised inside the model's own forward, where the embedding exists: sharded models do not allow calling
    a submodule from outside.

    Args:
        settings: initialisation and ascent.
        seed: seed of the random start.
        initial: ``[rows, tokens, width]`` tensor to start from instead.

    Attributes:
        delta: the value that the next pass adds; None before the first pass.
        relative_sizes: ||delta|| / ||embedding|| of every row in the last pass (l2).
        gradient_norm: mean over rows of the gradient's norm, set by the ascent step.
        frozen: whether the perturbation needs no gradient.
        mask: ``[rows, tokens]`` bool, True where the perturbation may be non-zero in this pass; None for everywhere.
        unit: unit of all sizes, broadcast to ``delta``; None for 1.
    """

    def __init__(self, settings: AscentSettings, seed: int = 0, *, initial: Tensor | None = None) -> None:
        self.settings = settings
        self.seed = seed
        self.delta = initial
        self.frozen = False
        self.relative_sizes: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.mask: Tensor | None = None
        self.unit: Tensor | None = None

    def begin(self, mask: Tensor | None, *, confined: bool = False) -> None:
        """Prepare a forward pass with the given ``[rows, tokens]`` mask; see ``Point.confined``."""
        self.mask = mask if self.settings.mask_padding or confined else None

    def apply(self, embedding: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the perturbed embedding in its own dtype; the sum is computed in fp32 or wider.

        Args:
            embedding: ``[rows, tokens, width]``.
            table: ``[entries, width]`` weight that it was looked up in, if it was.
        """
        if self.unit is None and self.settings.relative_to != "none":
            self.unit = self._measure_unit(embedding.detach(), table)
        if self.delta is None:
            self.delta = self.start(embedding)
        self.delta = self.delta.detach().requires_grad_(not self.frozen)
        self.gradient_norm = None
        self._measure(embedding.detach())
        return (embedding + self.delta).to(embedding.dtype)

    def start(self, embedding: Tensor) -> Tensor:
        """Return the first value for an embedding ``[rows, tokens, width]``."""
        return initialise(embedding, self.settings, self.mask, self.seed, self.unit)

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
        self.delta = ascend(self.delta.detach(), gradient, self.settings, self.mask, self.unit)

    def _measure_unit(self, embedding: Tensor, table: Tensor | None) -> Tensor:
        """Return the unit of all sizes, which stays that of the first pass."""
        settings = self.settings
        if settings.relative_to == "table":
            if table is None:
                raise RuntimeError("relative_to=table: the perturbed value is not looked up in a table")
            norms: Tensor = torch.linalg.vector_norm(table.detach().float(), dim=-1)
            return norms.mean()
        if self.mask is not None:
            embedding = embedding * self.mask.unsqueeze(-1)
        return row_norm(
            embedding.to(torch.promote_types(embedding.dtype, torch.float32)), settings.norm, settings.scope
        )

    def _measure(self, embedding: Tensor) -> None:
        assert self.delta is not None
        if self.mask is not None:
            embedding = embedding * self.mask.unsqueeze(-1)
        size = flat_norm(self.delta.detach(), "l2")
        self.relative_sizes = size / flat_norm(embedding, "l2").to(size.dtype).clamp_min(1e-12)
