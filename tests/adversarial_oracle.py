"""VILLA as a loop written by hand, without hooks, that sends every term through every graph."""

from collections.abc import Callable
from typing import Any

import torch
from tiny import RecordingPasses, gradients
from torch import Tensor

from villa.batch import Batch
from villa.losses.base import Loss
from villa.models.base import Model, ModelOutput
from villa.trainers.villa import VillaConfig

VIEWS = {
    "text": [["text"]],
    "image": [["image"]],
    "both": [["text", "image"]],
    "alternating": [["text"], ["image"]],
}


def divergence(a: Tensor, b: Tensor, reduction: str) -> Tensor:
    """The symmetric divergence of two softmax distributions; finite where a probability is 0."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    terms = (log_p.exp() - log_q.exp()) * (log_p - log_q)
    return terms.mean() if reduction == "mean" else terms.sum(-1).mean()


def oracle(
    model: Any,
    batch: Batch,
    config: VillaConfig,
    score: Callable[..., Tensor],
    loss: Loss,
    widths: dict[str, int],
    *,
    masks: dict[str, Tensor] | None = None,
    apart: Callable[[Tensor, Tensor, str], Tensor] = divergence,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Parameter gradients and the perturbations of every pass, by autograd through one big graph.

    Args:
        model: the model, in double precision.
        batch: a batch with padding.
        config: the options of VILLA, starting from zero.
        score: ``score(model, batch, text, image)``, the logits with perturbations, written out.
        loss: the task loss.
        widths: width of the perturbation of each modality.
        masks: where each may be perturbed; None asks the model.
        apart: how far the logits are from the clean ones.
    """
    masks = perturbed(model, batch) if masks is None else masks
    zeros = {m: torch.zeros(*mask.shape, widths[m], dtype=torch.float64) for m, mask in masks.items()}
    deltas = {m: zeros[m].clone() for m in masks}

    def task(logits: Tensor) -> Tensor:
        value: Tensor = loss(ModelOutput(logits), batch)
        return value

    views = VIEWS[config.modality]
    clean = score(model, batch, **zeros)
    target = clean if config.clean_logits == "attached" else clean.detach()
    total = task(clean) if config.clean_loss else torch.zeros((), dtype=torch.float64)
    weight = 1 / (config.steps * (len(views) if config.average_views else 1))
    used = []
    for _ in range(config.steps):
        leaves = {m: d.clone().requires_grad_() for m, d in deltas.items()}
        terms = []
        for view in views:
            logits = score(model, batch, **{m: leaves[m] if m in view else zeros[m] for m in zeros})
            terms.append(task(logits) + config.kl_weight * apart(logits, target, config.kl_reduction))
        objective = torch.stack(terms).sum()
        total = total + weight * objective
        names = [m for view in views for m in view]
        used.append({m: deltas[m] for m in names})
        for m, gradient in zip(
            names, torch.autograd.grad(objective, [leaves[m] for m in names], retain_graph=True), strict=True
        ):
            g = gradient * masks[m][..., None]
            size = g.flatten(1).norm(dim=1) if config.norm == "l2" else g.flatten(1).abs().amax(1)
            deltas[m] = deltas[m] + getattr(config, f"{m}_step_size") * g / size.clamp(min=1e-8)[:, None, None]
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, gradients, strict=True) if g is not None}, used


def perturbed(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Where each modality may be perturbed: ``[rows, tokens]`` bool."""
    masks = {m: point.mask(batch) for m, point in model.perturbation_points().items()}
    return {m: mask for m, mask in masks.items() if mask is not None}


def assert_equals_loop(
    model: Model,
    passes: RecordingPasses,
    expected: Any,
    modality: str,
    *,
    clean: int,
    unused: bool = False,
    rtol: float = 1e-9,
    atol: float = 1e-12,
) -> None:
    """A trainer's step ends with the gradients of ``oracle``, and used its perturbations in every pass.

    Args:
        model: with the gradients.
        passes: that the step took.
        expected: what ``oracle`` returned.
        modality: of the perturbations.
        clean: how many of the passes come before the perturbed ones.
        unused: whether some parameters may have a gradient of zeros on one side and none on the other.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    wanted, used = expected
    mine = gradients(model)
    if unused:
        assert {name for name, gradient in wanted.items() if gradient.abs().sum() > 0} <= mine.keys()
    else:
        assert mine.keys() == wanted.keys()
    for name, gradient in mine.items():
        other = wanted.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    views = len(VIEWS[modality])
    assert len(passes.used) == clean + views * len(used) > clean
    for t, step in enumerate(used):
        ours = {m: d for v in range(views) for m, d in passes.used[clean + t * views + v].items()}
        assert ours.keys() == step.keys()
        for name, delta in step.items():
            torch.testing.assert_close(ours[name], delta, rtol=rtol, atol=atol)
