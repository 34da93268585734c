"""Divergence between the predictions on clean and on perturbed inputs."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["batchmean", "mean"]


def symmetric_kl(logits: Tensor, clean_logits: Tensor, reduction: Reduction = "batchmean") -> Tensor:
    """KL(p||q) + KL(q||p) of the two softmax distributions (VILLA, the L_kl of R_kl).

    Args:
        logits: ``[rows, labels]`` on perturbed inputs.
        clean_logits: ``[rows, labels]`` on clean inputs; gradients flow into both.
        reduction: ``batchmean`` sums over labels and averages over rows; ``mean`` averages over both (what the
            released code does for VCR: half of ``batchmean`` with two labels).
    """
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(clean_logits, -1)
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    terms = terms + F.kl_div(log_p, log_q, reduction="none", log_target=True)
    return terms.mean() if reduction == "mean" else terms.sum(-1).mean()
