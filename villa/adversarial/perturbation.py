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
        relative_size: mean over rows of ||delta|| / ||embedding|| in the last pass (l2).
        gradient_norm: mean over rows of the gradient's norm, set by the ascent step.
        frozen: whether the perturbation needs no gradient.
    """

    def __init__(self, settings: AscentSettings, seed: int = 0, *, initial: Tensor | None = None) -> None:
        self.settings = settings
        self.seed = seed
        self.delta = None if initial is None else initial.detach()
        self.frozen = False
        self.relative_size: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self._mask: Tensor | None = None
        self._unit: Tensor | None = None

    def begin(self, mask: Tensor | None, *, confined: bool = False) -> None:
        """Prepare a forward pass with the given ``[rows, tokens]`` mask; see ``Point.confined``."""
        self._mask = mask if self.settings.mask_padding or confined else None

    def apply(self, embedding: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the perturbed embedding in its own dtype; the sum is computed in fp32 or wider.

        Args:
            embedding: ``[rows, tokens, width]``.
            table: ``[entries, width]`` weight that it was looked up in, if it was.
        """
        if self._unit is None and self.settings.relative_to != "none":
            self._unit = self._measure_unit(embedding.detach(), table)
        if self.delta is None:
            self.delta = initialise(embedding, self.settings, self._mask, self.seed, self._unit)
        delta = self.delta.detach() if self.delta.requires_grad else self.delta  # a leaf without a gradient yet
        self.gradient_norm, self.relative_size = None, self._measured(embedding.detach(), delta)
        self.delta = delta.requires_grad_(not self.frozen)
        moved = embedding + self.delta
        return moved if moved.dtype == embedding.dtype else moved.to(embedding.dtype)

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
        norms = flat_norm(gradient, self.settings.norm)
        self.gradient_norm = norms.sum() / len(norms)
        self.delta = ascend(self.delta.detach(), gradient, self.settings, self._mask, self._unit)

    def _measure_unit(self, embedding: Tensor, table: Tensor | None) -> Tensor:
        """Return the unit of all sizes, which stays that of the first pass."""
        settings = self.settings
        if settings.relative_to == "table":
            if table is None:
                raise RuntimeError("relative_to=table: the perturbed value is not looked up in a table")
            norms: Tensor = torch.linalg.vector_norm(table.detach().float(), dim=-1)
            return norms.mean()
        if self._mask is not None:
            embedding = embedding * self._mask.unsqueeze(-1)
        return row_norm(
            embedding.to(torch.promote_types(embedding.dtype, torch.float32)), settings.norm, settings.scope
        )

    def _measured(self, embedding: Tensor, delta: Tensor) -> Tensor:
        """Return the mean over rows of ||delta|| / ||embedding||."""
        lengths = torch.linalg.vector_norm(embedding, dim=-1, dtype=torch.promote_types(embedding.dtype, torch.float32))
        if self._mask is not None:
            lengths = lengths * self._mask
        sizes = flat_norm(delta, "l2") / flat_norm(lengths, "l2").clamp_min(1e-12)
        return sizes.sum() / len(sizes)
