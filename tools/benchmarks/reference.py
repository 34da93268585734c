"""UNITER and its adversarial updates as published: padded, unfused, and written without villa's modules and loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch

#: Modalities perturbed in each pass of a step, by method.
VIEWS = {
    "standard": [],
    "freelb": [("text", "image")],
    "text": [("text",)],
    "both": [("text", "image")],
    "alternating": [("text",), ("image",)],
}
STEPS, STEP_SIZE, CLIP_NORM, LEARNING_RATE = 3, 1e-3, 2.0, 1e-4
BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.01


#: Texts and images of an example, by task. One of several texts or images is repeated, so that a row has one of each.
TASKS = {"vqa": (1, 1), "vcr": (4, 1), "nlvr2": (1, 2)}


class PlainUniter:
    """UNITER with the head for VQA, VCR or (paired) NLVR2, on the parameters of another model.

    Args:
        parameters: parameters under their released names.
        heads: attention heads.
        rate: dropout of everything.
    """

    def __init__(self, parameters: Mapping[str, Tensor], heads: int, rate: float) -> None:
        self.parameters, self.heads, self.rate = parameters, heads, rate
        self.layers = 1 + max(
            int(name.split(".")[3]) for name in parameters if name.startswith("uniter.encoder.layer.")
        )

    def __call__(self, batch: Batch, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """Score a batch of rows, with perturbations of its word embeddings and features: ``[B, labels]``."""
        hidden, mask = self.packed(batch, self.words(batch, text), self.regions(batch, image))
        scores = torch.where(mask, 0.0, -10000.0)[:, None, None]
        for number in range(self.layers):
            hidden = self.layer(f"uniter.encoder.layer.{number}", hidden, scores)
        pooled = torch.tanh(self.linear("uniter.pooler.dense", hidden[:, 0]))
        if "nlvr2_output.weight" in self.parameters:
            return self.linear("nlvr2_output", pooled.view(-1, 2 * pooled.shape[1]))
        head, activation = ("vcr_output", F.relu) if "vcr_output.0.weight" in self.parameters else ("vqa_output", gelu)
        wide = self.norm(f"{head}.2", activation(self.linear(f"{head}.0", pooled)))
        return self.linear(f"{head}.3", wide)

    def words(self, batch: Batch, delta: Tensor | None) -> Tensor:
        """Embed the texts, ``[B, T, hidden]``."""
        name, tables = "uniter.embeddings", self.parameters
        words = F.embedding(batch.input_ids, tables[f"{name}.word_embeddings.weight"], padding_idx=0)
        words = words if delta is None else words + delta
        places = tables[f"{name}.position_embeddings.weight"][: words.shape[1]]
        types = tables[f"{name}.token_type_embeddings.weight"][0]
        return self.dropout(self.norm(f"{name}.LayerNorm", words + places + types))

    def regions(self, batch: Batch, delta: Tensor | None) -> Tensor:
        """Embed the regions, ``[B, R, hidden]``."""
        name, features, boxes = "uniter.img_embeddings", batch.features, batch.boxes
        features = features if delta is None else features + delta
        sizes = boxes[..., 2:] - boxes[..., :2]
        geometry = torch.cat((boxes, sizes, sizes.prod(-1, keepdim=True)), dim=-1)
        seen = self.norm(f"{name}.img_layer_norm", self.linear(f"{name}.img_linear", features))
        placed = self.norm(f"{name}.pos_layer_norm", self.linear(f"{name}.pos_linear", geometry))
        types = self.parameters["uniter.embeddings.token_type_embeddings.weight"]
        images = 2 if "nlvr2_output.weight" in self.parameters else 1
        types = types[1 + torch.arange(len(features)) % images].unsqueeze(1)
        return self.dropout(self.norm(f"{name}.LayerNorm", seen + placed + types))

    def packed(self, batch: Batch, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Move real positions to the front of each row, up to the longest: ``[B, L, hidden]`` and its mask."""
        real = torch.cat((batch.attention_mask, batch.region_mask), dim=1)
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : real.sum(1).max()]
        both = torch.cat((text, image), dim=1)
        return both.gather(1, order.unsqueeze(-1).expand(-1, -1, both.shape[-1])), real.gather(1, order)

    def layer(self, name: str, hidden: Tensor, scores: Tensor) -> Tensor:
        """Run a layer on every position, padding included."""
        rows, length, width = hidden.shape
        query, key, value = (
            self.linear(f"{name}.attention.self.{part}", hidden).view(rows, length, self.heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        weights = (query @ key.transpose(-1, -2) / math.sqrt(width // self.heads) + scores).softmax(dim=-1)
        context = (self.dropout(weights) @ value).transpose(1, 2).reshape(rows, length, width)
        hidden = self.residual(f"{name}.attention.output", context, hidden)
        return self.residual(f"{name}.output", gelu(self.linear(f"{name}.intermediate.dense", hidden)), hidden)

    def residual(self, name: str, inner: Tensor, hidden: Tensor) -> Tensor:
        """End a sublayer."""
        return self.norm(f"{name}.LayerNorm", self.dropout(self.linear(f"{name}.dense", inner)) + hidden)

    def linear(self, name: str, given: Tensor) -> Tensor:
        """Apply a linear layer."""
        return F.linear(given, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])

    def norm(self, name: str, given: Tensor) -> Tensor:
        """Apply a LayerNorm."""
        weight, bias = (self.parameters[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(given, weight.shape, weight, bias, eps=1e-12)

    def dropout(self, given: Tensor) -> Tensor:
        """Drop entries."""
        return F.dropout(given, self.rate)


def gelu(given: Tensor) -> Tensor:
    """GELU, in single operations."""
    return given * 0.5 * (1.0 + torch.erf(given / math.sqrt(2.0)))


def rows_of(batch: Batch) -> Batch:
    """Repeat the text of several images, or the image of several texts: a batch with one of each in a row."""
    ids, mask = batch.input_ids, batch.attention_mask
    features, boxes, seen = batch.features, batch.boxes, batch.region_mask
    texts = ids.shape[1] if ids.dim() == 3 else 1
    images = features.shape[1] if features.dim() == 4 else 1
    ids, mask = (t.flatten(0, -2).repeat_interleave(images, 0) for t in (ids, mask))
    if images > 1:
        features, boxes, seen = (t.flatten(0, 1) for t in (features, boxes, seen))
    features, boxes, seen = (t.repeat_interleave(texts, 0) for t in (features, boxes, seen))
    return replace(batch, input_ids=ids, attention_mask=mask, features=features, boxes=boxes, region_mask=seen)


def backward(score: Callable[..., Tensor], batch: Batch, method: str) -> None:
    """Run the passes of an update; every one is sent back as soon as it has run, VILLA's through the clean graph too.

    Args:
        score: ``score(batch, text=None, image=None)``, the logits in fp32 or wider.
        batch: rows, with soft targets ``[B, labels]`` or classes.
        method: a key of ``VIEWS``.
    """

    def task(logits: Tensor) -> Tensor:
        if not batch.targets.is_floating_point():
            return F.cross_entropy(logits, batch.targets.flatten())
        return F.binary_cross_entropy_with_logits(logits, batch.targets) * logits.shape[1]

    clean = None if method == "freelb" else score(batch)
    if method == "standard":
        task(clean).backward()
        return
    dtype = torch.promote_types(batch.features.dtype, torch.float32)
    width = getattr(score, "width", batch.features.shape[-1])
    deltas = {
        "text": torch.zeros(*batch.input_ids.shape, width, dtype=dtype),
        "image": torch.zeros_like(batch.features),
    }
    views = VIEWS[method]
    for step in range(STEPS):
        for view in views:
            leaves = {m: deltas[m].requires_grad_() for m in view}
            logits = score(batch, **leaves)
            loss = task(logits) if clean is None else task(logits) + divergence(logits, clean)
            (loss / (STEPS * len(views))).backward(retain_graph=clean is not None)
            if step + 1 < STEPS:
                deltas |= {m: ascended(leaf) for m, leaf in leaves.items()}


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """The symmetric divergence of two softmax distributions, averaged over rows."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def ascended(delta: Tensor) -> Tensor:
    """A step along the gradient, normalised in every row."""
    size = delta.grad.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None]
    return (delta.detach() + STEP_SIZE * delta.grad / size).detach()


class PlainAdamW:
    """The released AdamW, one parameter after the other, after clipping."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.state: dict[str, Any] = {}
        self.count = 0

    def step(self) -> None:
        """Clip, step, and drop the gradients."""
        self.count += 1
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        size = LEARNING_RATE * math.sqrt(1 - BETAS[1] ** self.count) / (1 - BETAS[0] ** self.count)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    self._move(name, parameter, size)
                    parameter.grad = None

    def _move(self, name: str, parameter: Tensor, size: float) -> None:
        zeros = torch.zeros_like
        first, second = self.state.setdefault(name, (zeros(parameter), zeros(parameter)))
        first.mul_(BETAS[0]).add_(parameter.grad, alpha=1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
        parameter.addcdiv_(first, second.sqrt().add_(EPSILON), value=-size)
        if not any(part in name for part in ("bias", "LayerNorm.weight")):
            parameter.add_(parameter, alpha=-LEARNING_RATE * WEIGHT_DECAY)
