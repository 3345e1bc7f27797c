"""The table of pair maps: functions of one pair's logit or distance.

Each kind has a map for positives and one for negatives. A new kind touches this table, `Map` in
csrc/cpu/pairs/maps.h, `pair_map` in the Triton kernels and `Map` in csrc/cuda/pairs/maps.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """One kind of maps. Its number is the same in csrc/problem.h and in the kernels."""

    number: int
    of_distance: bool = False  # the argument is the Euclidean distance of the rows, else the logit
    margins: bool = True  # the maps have the margins pos_margin and neg_margin


KINDS = {
    "softplus": Kind(0, margins=False),  # log(1 + exp(-s)) of a positive, log(1 + exp(s)) of a negative
    "hinge": Kind(1),  # max(0, pos_margin - s), max(0, s - neg_margin)
    "distance": Kind(2, of_distance=True),  # max(0, d - pos_margin), max(0, neg_margin - d)
    "squared": Kind(3, of_distance=True),  # half the squares of "distance"
}

FAR = 1e30  # an offset of a row's logits for which the softplus of its positives is 0


def mapped(kind: str, t: Tensor, positive: bool, margin: float) -> tuple[Tensor, Tensor]:
    """The map's value and derivative at logits or distances t; the derivative of a distance at 0 is unused."""
    if kind == "softplus":
        sign = -1 if positive else 1
        return torch.logaddexp(sign * t, torch.zeros_like(t)), sign * torch.sigmoid(sign * t)
    sign = (-1 if positive else 1) if kind == "hinge" else (1 if positive else -1)
    above = (sign * (t - margin)).clamp(min=0)  # NaN stays NaN
    if kind == "squared":
        return above * above / 2, sign * above
    return above, torch.where(above.isnan(), above, sign * (above > 0))
