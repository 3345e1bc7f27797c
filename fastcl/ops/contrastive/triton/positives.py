"""The anchors' own positives in two launches; `own_contrasts` has the formulas, and computes the other cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import triton_launch
from ...backends.rows import LARGEST_INVERSE
from ...backends.triton_launch import INTERPRETED, blocks, on_device
from ...backends.triton_tiles import padded, row_tile
from .. import own_contrasts
from ..records import Gradients, Needs, Problem, Side, Statistics
from .rows import fields_wanted, new_inverse_norms


def takes(p: Problem) -> bool:
    """Whether the kernels compute the problem's own contrasts."""
    alone = p.positives is not None and p.hard_negatives is None
    wanted = {"lse_all", "lse_pos", "lse_neg", "sum_pos"}.issuperset(p.want)
    return alone and wanted and p.sizes[0] == 1 and p.sizes[1] > 0 and p.dtype == torch.float32


def join(p: Problem, statistics: Statistics) -> Statistics:
    """The statistics with the positives' logits."""
    side = statistics.anchors
    # Statistics for monitoring come from torch's operators, so that with them the fields have the same bits.
    observed = own_contrasts.join(p, statistics).anchors.observed if p.observe else None
    joined = Side(*(torch.empty_like(part) for part in side[:3]))._replace(observed=observed)
    given: dict[str, Any] = {"FIELDS": side.fields, "COUNTS": side.counts, "PARTS": side.parts}
    given |= {"NEW_FIELDS": joined.fields, "NEW_COUNTS": joined.counts, "NEW_PARTS": joined.parts}
    _launch("positive_kernel", p, statistics, given)
    return statistics._replace(anchors=joined)


def add_gradients(p: Problem, saved: Statistics, grad: Tensor, needs: Needs, sweep: Gradients) -> Gradients:
    """The sweep's gradients plus those through the positives. grad: [W, S, N], of the joined fields."""
    assert p.positives is not None
    new = p.logit_scale.new_empty
    anchors = None if sweep.anchors is None else torch.empty_like(sweep.anchors)
    positives = new(p.positives.shape) if needs.positives else None
    sums = None if sweep.logit_scale is None else new(len(p.positives))
    given: dict[str, Any] = {"GRAD": grad.contiguous(), "PARTS": saved.anchors.parts, "SWEPT": sweep.anchors}
    given |= {"X_GRADIENT": anchors, "Y_GRADIENT": positives, "SIMILARITY_SUMS": sums}
    _launch("positive_gradient_kernel", p, saved, given | {"LARGEST_INVERSE": LARGEST_INVERSE[p.dtype]})
    scale = sweep.logit_scale
    if scale is not None and sums is not None:  # cancels against the sweep's as training converges
        scale = scale.double() + sums.double().sum(0, keepdim=True)
    return sweep._replace(anchors=anchors, positives=positives, logit_scale=scale)


def _launch(kernel: str, p: Problem, statistics: Statistics, given: dict[str, Any]) -> None:
    x, y = p.anchors.values.detach().resolve_neg(), p.positives
    assert y is not None
    y = y.detach().resolve_neg()
    n, d = x.shape
    width = padded(d, INTERPRETED)
    shape = row_tile(width, INTERPRETED)
    with on_device(p.device):
        norms = p.anchors.normalize
        given |= {
            "X": x,
            "Y": y,
            "X_NORMS": statistics.anchor_inverse_norms if norms else None,
            "Y_NORMS": new_inverse_norms(y) if norms else None,
            "SCALE": p.logit_scale,
            "N": n,
            "WIDTH": d,
            "X_STRIDE": x.stride(0),
            "X_COLUMN_STRIDE": x.stride(1),
            "Y_STRIDE": y.stride(0),
            "Y_COLUMN_STRIDE": y.stride(1),
            "D": width,
            "BLOCK_M": shape.block_m,
            "BLOCK_D": shape.block_d,
            **fields_wanted(p),
        }
        triton_launch.launch(kernel, shape, (blocks(n, shape.block_m),), given)
