"""Infinite numbers in rows that are not normalised: such a row counts as a row of NaN.

Otherwise it could have logits of -inf only, leave no trace in the log-sums, and the loss would be finite. Normalised
rows need nothing, because their norm makes them NaN. The `cpu` engine does the same as it computes norms.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...checks import values_visible
from .records import Problem, Rows


def as_nan(p: Problem) -> Problem:
    """The problem with NaN for rows that have infinite numbers."""
    anchors = rows_as_nan(p.anchors)
    contrasts = None if p.contrasts is None else rows_as_nan(p.contrasts)
    if anchors is p.anchors and contrasts is p.contrasts:
        return p
    return replace(p, anchors=anchors, contrasts=contrasts)


def rows_as_nan(rows: Rows) -> Rows:
    if rows.normalize:
        return rows
    infinite = rows.values.isinf().any(1)
    if values_visible(infinite) and not bool(infinite.any()):
        return rows
    return rows._replace(values=rows.values.masked_fill(infinite[:, None], torch.nan))
