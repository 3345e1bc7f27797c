"""Which pairs are admissible and which are positives, as masks of a block of anchors. For backends in plain PyTorch.

| data of the rows | a pair is |
|---|---|
| `clusters` equal, or a common bit in `tags` | positive |
| `ids` equal, unless `samples` are equal too | inadmissible |
| `groups` not equal | inadmissible |
| cosine of `guide` rows above the anchor's `thresholds` | inadmissible, unless it is positive |

The diagonal of self-contrast and contrasts with a bias of -inf are the caller's to leave out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.rows import inverse_norms
from .records import Problem


def positives(p: Problem, rows: slice) -> Tensor | None:
    """Bool [B, M]; None if no rule makes positives."""
    same = _equal(p.anchors.clusters, p.others.clusters, rows)
    tagged = _sharing(p.anchors.tags, p.others.tags, rows)
    if same is None or tagged is None:
        return tagged if same is None else same
    return same.logical_or_(tagged)


def inadmissible(
    p: Problem, rows: slice, positive: Tensor | None, guides: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """Bool [B, M]; None if no rule leaves out a pair. guides: of `guide_rows`."""
    found = _equal(p.anchors.ids, p.others.ids, rows)
    kept = _equal(p.anchors.samples, p.others.samples, rows)
    if found is not None and kept is not None:
        found &= ~kept
    together = _equal(p.anchors.groups, p.others.groups, rows)
    if together is not None:
        found = ~together if found is None else found.logical_or_(~together)
    if guides is not None and p.anchors.thresholds is not None:
        beyond = guides[0][rows] @ guides[1].T > p.anchors.thresholds[rows, None]
        if positive is not None:
            beyond &= ~positive
        found = beyond if found is None else found.logical_or_(beyond)
    return found


def guide_rows(p: Problem) -> tuple[Tensor, Tensor] | None:
    """The guide rows of anchors and contrasts, normalised, in the dtype of the sums."""
    own, other = p.anchors.guide, p.others.guide
    if own is None or other is None:
        return None

    def unit(rows: Tensor) -> Tensor:
        rows = rows.to(p.dtype)
        return rows * inverse_norms(rows)[:, None]

    left = unit(own)
    return left, left if own is other else unit(other)


def _equal(left: Tensor | None, right: Tensor | None, rows: slice) -> Tensor | None:
    if left is None or right is None:
        return None
    ids = left[rows, None]
    return (ids == right) & (ids != -1)


def _sharing(left: Tensor | None, right: Tensor | None, rows: slice) -> Tensor | None:
    if left is None or right is None:
        return None
    own = left[rows]
    found = torch.zeros(len(own), len(right), dtype=torch.bool, device=left.device)
    for word in range(left.shape[1]):
        found |= (own[:, word, None] & right[:, word]) != 0
    return found
