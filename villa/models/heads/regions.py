"""Which region a text speaks of: referring expressions."""

from __future__ import annotations

from torch import Tensor, nn

from villa.models.uniter import Encoded, Uniter
from villa.models.uniter_config import register_head
from villa.models.uniter_sizes import LAYER_NORM_EPS

#: Score of a region that is padding, in the release too: finite, so that 0 x score is 0 in the KL term.
PADDED_SCORE = -1e4


@register_head("regions")
class UniterForRegions(Uniter):
    """Logits ``[B, R]``, a score for each region, from its last state by one linear map (``mlp: 1`` in the release)."""

    labels = 1

    def add_head(self) -> None:
        """Add ``re_output``."""
        self.re_output: nn.Module = nn.Linear(self.sizes.hidden_size, 1)

    def score(self, encoded: Encoded) -> tuple[Tensor, None]:
        """Score each region of each row; the pooler is not used."""
        scores: Tensor = self.re_output(encoded.regions).squeeze(-1)
        mask = encoded.rows.region_mask
        return scores if mask is None else scores.masked_fill(~mask, PADDED_SCORE), None

    def head_prefixes(self) -> tuple[str, ...]:
        """The released group with its own learning rate."""
        return ("re_output",)


@register_head("regions_mlp")
class UniterForRegionsMlp(UniterForRegions):
    """The same with two layers, GELU and LayerNorm between them (``mlp: 2`` in the release)."""

    def add_head(self) -> None:
        """Add ``re_output``."""
        hidden = self.sizes.hidden_size
        self.re_output = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=LAYER_NORM_EPS), nn.Linear(hidden, 1)
        )
