"""Infinite numbers in rows that are taken as they are: the statistics of every row that meets one are NaN.

Without this, a row whose logits are all -inf would drop out of the log-sums, and a loss would be finite. Normalised
rows need nothing: an infinite number makes them NaN. The `cpu` engine sees infinite rows as it measures their norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .records import Problem, Rows, Side, Statistics


def mark(p: Problem, found: Statistics) -> Statistics:
    """The statistics, NaN where a row is infinite or meets one that is."""
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
    """Of each row 0, or NaN if it has a number that is not finite."""
    if rows.normalize:
        return p.logit_scale.new_zeros(len(rows.values))
    largest: Tensor = torch.linalg.vector_norm(rows.values, ord=torch.inf, dim=1)
    return largest.to(p.dtype) * 0


def _marked(side: Side, marks: Tensor) -> Side:
    return side._replace(fields=side.fields + marks, parts=side.parts + marks)
