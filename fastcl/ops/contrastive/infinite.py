"""Makes statistics NaN if rows that are not normalised have infinite numbers.

Otherwise an infinite row could have logits of -inf only, leave no trace in the log-sums, and the loss would be finite.
Normalised rows need nothing: an infinite number makes them NaN. The `cpu` engine does the same as it computes norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .records import Problem, Rows, Side, Statistics


def mark(p: Problem, found: Statistics) -> Statistics:
    """The statistics, NaN for every row that is not finite and for every row with such a contrast."""
    if (p.anchors.normalize and p.others.normalize) or 0 in p.sizes[1:]:
        return found
    rows = _marks(p.anchors, p)
    others = rows if p.contrasts is None else _marks(p.contrasts, p)
    if (left_out := p.left_out) is not None:
        others = others.masked_fill(left_out, 0)
    anchors = _marked(found.anchors, rows + others.sum())
    return found._replace(
        anchors=anchors, contrasts=_marked(found.contrasts, others + rows.sum()) if p.both else found.contrasts
    )


def _marks(rows: Rows, p: Problem) -> Tensor:
    """[N]: NaN for a row with a number that is not finite, else 0."""
    if rows.normalize:
        return p.logit_scale.new_zeros(len(rows.values))
    largest: Tensor = torch.linalg.vector_norm(rows.values, ord=torch.inf, dim=1)
    return largest.to(p.dtype) * 0


def _marked(side: Side, marks: Tensor) -> Side:
    return side._replace(fields=side.fields + marks, parts=side.parts + marks)
