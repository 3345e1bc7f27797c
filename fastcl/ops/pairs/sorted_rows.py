"""Both GPU backends of the pair sums: rows as those of the contrastive statistics, numbers in the order of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contrastive.records import Problem, Rows
from .records import Pairs


def as_problem(p: Pairs) -> Problem:
    """The rows as those of contrastive statistics. Self-contrast ignores ids; clusters and ids are of both sets."""
    others = p.contrasts
    clustered = others is None or (p.anchors.clusters is not None and others.clusters is not None)
    named = others is not None and p.anchors.ids is not None and others.ids is not None

    def rows(given: Rows) -> Rows:
        clusters, ids = given.clusters if clustered else None, given.ids if named else None
        return Rows(given.values, clusters, ids, given.bias, normalize=given.normalize)

    contrasts = None if others is None else rows(others)
    return Problem(rows(p.anchors), contrasts, None, p.logit_scale.reshape(1), (), partial=True)


def is_symmetric(p: Pairs) -> bool:
    """Whether a pair and its mirror image have the same logit: one sweep gives the gradient of both roles."""
    return p.contrasts is None and (p.offset is None or p.offset.dim() == 0)


def in_order(values: Tensor, order: Tensor | None) -> Tensor:
    """Numbers of each row, along the last dimension, in the order of the sorted rows; contiguous."""
    values = values.detach().resolve_neg()
    return (values if order is None else values[..., order]).contiguous()


def marked(bias: Tensor) -> Tensor:
    """The contrasts' bias, infinity (the kernels' LEFT_OUT) for contrasts that take no part, NaN for infinity."""
    return torch.where(bias == -torch.inf, torch.inf, torch.where(bias == torch.inf, torch.nan, bias))
