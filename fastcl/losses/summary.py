"""Detached statistics to monitor a contrastive loss in training, from the same sweep as the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.contrastive.observed import part


class LossStats(NamedTuple):
    """Detached statistics of a loss, from ``criterion(..., return_stats=True)``, which returns ``(loss, stats)``.

    Means over the anchors that have the set in question, 0-dimensional; NaN if no anchor has it. With
    ``reduction="none"`` one value for each anchor, shaped as the loss; NaN for an anchor without the set. float32, or
    float64 for float64 embeddings.

    With ``gather`` the means are over the anchors of all processes, and are the same on each of them.

    With ``symmetric``, `reverse` holds the statistics of the contrasts over the anchors. Margin, weights, `form` and
    `denominator` have no influence.
    """

    top1: Tensor
    """share of anchors, among those with a positive, whose largest logit is a positive's; a tie with a negative does
    not count"""
    positive_similarity: Tensor
    """mean similarity with the positives: cosine, or inner product with ``normalize=False``"""
    negative_similarity: Tensor
    """mean similarity with the negatives"""
    entropy: Tensor
    """entropy in nats of the softmax of the logits over all contrasts: 0 if one contrast has all the mass, the log of
    their number if all logits are equal"""
    reverse: LossStats | None = None
    """with ``symmetric`` the statistics of each contrast over the anchors"""

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The statistics as a flat dictionary of floats, for a logger. Those of `reverse` are ``"reverse_top1"``, ...

        With ``reduction="none"`` each is the mean over the anchors where it is not NaN. One transfer from the device.
        `prefix` begins every name: ``stats.scalars("train/")`` has ``"train/top1"``.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: expected a string, got {type(prefix).__name__}")
        names = self._fields[:-1]
        found: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        if self.reverse is not None:
            found.update({f"reverse_{name}": getattr(self.reverse, name) for name in names})
        means = torch.stack([value.nanmean() for value in found.values()]).tolist()
        return {prefix + name: mean for name, mean in zip(found, means, strict=True)}


def summary(
    observed: Tensor,
    scale: Tensor,
    shape: tuple[int, ...],
    reduction: str,
    dtype: torch.dtype,
    total: Callable[[Tensor], Tensor] | None = None,
) -> LossStats:
    """The summary of one side. observed: [10, S, N], of which scale 0 is the loss's. scale: that scale, [].

    total: sums numbers over processes; None in a single process.
    """
    seen = observed[:, 0]
    num_pos, num_neg = part(seen, "num_pos"), part(seen, "num_neg")

    def similarity(name: str, count: Tensor) -> Tensor:
        return part(seen, name) / (count.clamp(min=1) * scale)

    def reduced(*parts: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The values of each part, of the rows where they are there, as the loss is reduced."""
        if reduction == "none":
            return [torch.where(there, values.to(dtype), torch.nan).reshape(shape) for values, there in parts]
        sums = [torch.where(there, values.to(dtype), 0).sum() for values, there in parts]
        counts = [there.sum() for _, there in parts]
        if total is not None:
            sums, counts = total(torch.stack([*sums, *counts]).double()).view(2, -1).unbind()  # type: ignore[assignment]
        return [(one / count).to(dtype) for one, count in zip(sums, counts, strict=True)]

    nearest = (part(seen, "max_pos") > part(seen, "max_neg")).to(dtype)
    nearest = torch.where(part(seen, "lse").isfinite(), nearest, torch.nan)  # with NaN logits there is no largest one
    top1, positive, negative, entropy = reduced(
        (nearest, num_pos > 0),
        (similarity("plain_pos", num_pos), num_pos > 0),
        (similarity("plain_neg", num_neg), num_neg > 0),
        (part(seen, "entropy"), num_pos + num_neg > 0),
    )
    return LossStats(top1, positive, negative, entropy)
