"""What to look at while a contrastive loss trains: its statistics, detached, out of the sweep that makes the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.contrastive.observed import part


class LossStats(NamedTuple):
    """Detached statistics of a loss, from ``criterion(..., return_stats=True)``, which returns ``(loss, stats)``.

    Means over anchors, 0-dimensional; NaN where there is no anchor of that kind. With ``reduction="none"`` the anchors'
    own, shaped as the loss, NaN where an anchor has no such set. float32, or float64 for float64 embeddings.

    With ``symmetric`` these are the anchors', and `reverse` holds the contrasts'. They are of the logits as they are:
    without margin, unweighted, and not told by `form` or `denominator`.
    """

    top1: Tensor
    """share of the anchors with a positive whose nearest contrast is one: no negative's logit is as large as the
    largest positive's"""
    positive_similarity: Tensor
    """mean similarity with the positives, of anchors that have some: cosine, or inner product without ``normalize``"""
    negative_similarity: Tensor
    """the same of the negatives"""
    entropy: Tensor
    """entropy of the softmax of the logits over all contrasts, natural logarithm: 0 where one contrast takes all of it,
    log of their number where all are alike"""
    reverse: LossStats | None = None
    """the same for each contrast over the anchors, with ``symmetric``"""


def summary(observed: Tensor, scale: Tensor, shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> LossStats:
    """Of one side: `observed` [10, S, N], the first scale of which is the loss's, `scale` []."""
    seen = observed[:, 0]
    num_pos, num_neg = part(seen, "num_pos"), part(seen, "num_neg")

    def similarity(name: str, count: Tensor) -> Tensor:
        return part(seen, name) / (count.clamp(min=1) * scale)

    def reduced(values: Tensor, there: Tensor) -> Tensor:
        values = values.to(dtype)
        if reduction == "none":
            return torch.where(there, values, torch.nan).reshape(shape)
        return torch.where(there, values, 0).sum() / there.sum()

    nearest = (part(seen, "max_pos") > part(seen, "max_neg")).to(dtype)
    nearest = torch.where(part(seen, "lse").isfinite(), nearest, torch.nan)  # with NaN there is no largest logit
    return LossStats(
        reduced(nearest, num_pos > 0),
        reduced(similarity("plain_pos", num_pos), num_pos > 0),
        reduced(similarity("plain_neg", num_neg), num_neg > 0),
        reduced(part(seen, "entropy"), num_pos + num_neg > 0),
    )
