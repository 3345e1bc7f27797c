"""Backend ``triton``: the kernels of `triton_forward` and `triton_backward`, prepared and launched.

Triton itself is imported by the first call. Nothing here waits for the device: sizes come from shapes, everything that
depends on values (shifts, which kernel applies) is decided on the device, and scalars travel as tensors, so that a CUDA
graph can replay the calls with other ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunked, triton_gradient
from .problem import Gradients, Needs, Problem, Side, Statistics, empty_side
from .triton_launch import INTERPRETED, availability, blocks, on_device, programs, refusal
from .triton_rows import LN2, LOG2E, Arranged, Launch, Rows, arrange, sums_are_kept

__all__ = ["INTERPRETED", "availability", "backward", "forward", "refusal", "saved_size"]

# Exponents that a sum may reach, and the bound on logits (to base 2) above which running maxima are taken at once.
HEADROOM, WIDE = 64.0, 150.0


def saved_size(p: Problem) -> int:
    """How many numbers the forward keeps for the backward.

    Of each row the bases, to base 2, of the sums over all, negatives and positives: [3, S, N], then [3, S, M]. For a
    backward of the anchors alone also the softmax-weighted sums of contrasts [N, D].
    """
    if p.dtype == torch.float64:
        return 0
    s, n, m = p.sizes
    return 3 * s * (n + m if p.both else n) + (n * p.anchors.shape[1] if sums_are_kept(p) else 0)


def forward(p: Problem) -> Statistics:
    _, n, m = p.sizes
    if p.dtype == torch.float64 or n == 0 or m == 0:
        return chunked.forward(p)._replace(saved=p.logit_scale.new_zeros(saved_size(p)))
    with on_device(p.device):
        return _forward(p)


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """Gradients from those of the anchors' fields [W, S, N] and, with `both`, of the contrasts' fields [W, S, M]."""
    _, n, m = p.sizes
    if p.dtype == torch.float64 or n == 0 or m == 0:
        return chunked.backward(p, saved, grad, grad_contrasts, needs)
    with on_device(p.device):
        return triton_gradient.backward(p, saved, grad, grad_contrasts, needs)


# Forward.


def _forward(p: Problem) -> Statistics:
    arranged, a, c = arrange(p)
    s, n, m = p.sizes
    shifts, wide = _shifts(p, arranged)
    apart = "lse_pos" in p.want or "lse_neg" in p.want
    rows = Launch.of(arranged, arranged.anchors, arranged.contrasts)
    columns = Launch.of(arranged, arranged.contrasts, arranged.anchors) if p.both else None
    new = p.logit_scale.new_empty
    statistics = new(s, 7, n)
    others = new(s, 7, m if p.both else 0)
    if sums_are_kept(p):
        weighted = _weighted_forward(p, rows, arranged.scales, statistics[0])
        anchors, bases = _side(p, statistics, m)
        return Statistics(anchors, empty_side(p), a, c, torch.cat([bases.flatten(), weighted.flatten()]))
    for k in range(s):
        scalars = {"SCALE": arranged.scales[k : k + 1], "SHIFT": shifts[k : k + 1], "WIDE": wide[k : k + 1]}
        if columns is None:
            shape = rows.tile("forward")
            arguments = scalars | {"STATISTICS": statistics[k], "MIXED_ONLY": False}
            rows.run("statistics_kernel", shape, (blocks(n, shape.block_m),), arguments)
        else:
            _two_ways(rows, columns, scalars, statistics[k], others[k])
        for launch, result in ((rows, statistics[k]), (columns, others[k])):
            if launch is not None:
                shape = launch.tile("running")
                arguments = scalars | {"STATISTICS": result, "APART": apart}
                launch.run("running_kernel", shape, (blocks(launch.size, shape.block_m),), arguments)
    anchors, bases = _side(p, statistics, m)
    contrasts, other_bases = empty_side(p), new(0)
    if p.both:
        contrasts, other_bases = _side(p, others, n)
    return Statistics(anchors, contrasts, a, c, torch.cat([bases.flatten(), other_bases.flatten()]))


def _weighted_forward(p: Problem, rows: Launch, scales: Tensor, statistics: Tensor) -> Tensor:
    """Of each anchor, in the sorted order, its negatives weighted by their exponentials: [N, D]."""
    shape = rows.tile("weighted")
    n, d = p.anchors.shape
    weighted = statistics.new_empty(n, d)
    largest = statistics.new_ones(1)
    if rows.columns.inverse_norms is not None:
        largest = rows.columns.inverse_norms.amax().clamp(min=1.0).reshape(1)
    rows.run(
        "weighted_kernel",
        shape,
        (blocks(n, shape.block_m), blocks(rows.rows.rows.shape[1], shape.block_d)),
        {
            "SCALE": scales,
            "LIFT": (14 - largest.log2().ceil()).exp2(),
            "STATISTICS": statistics,
            "WEIGHTED": weighted,
            "WIDTH": d,
        },
    )
    return weighted


def _two_ways(rows: Launch, columns: Launch, scalars: dict[str, Any], statistics: Tensor, others: Tensor) -> None:
    """Both sides from one sweep. The few tiles that hold positives are visited once more for the columns."""
    shape = rows.tile("two_way")
    number = min(blocks(rows.size, shape.block_m), programs(statistics.device))
    sums = statistics.new_zeros(number, columns.size)
    rows.run("two_way_kernel", shape, (number,), scalars | {"STATISTICS": statistics, "PARTIAL_SUMS": sums})
    shape = columns.tile("forward")
    arguments = scalars | {"STATISTICS": others, "MIXED_ONLY": True}
    columns.run("statistics_kernel", shape, (blocks(columns.size, shape.block_m),), arguments)
    total = sums.sum(0)
    order = columns.rows.order
    if order is None:
        others[1].copy_(total)
    else:
        others[1].index_copy_(0, order, total)


def _shifts(p: Problem, arranged: Arranged) -> tuple[Tensor, Tensor]:
    """[S] what to take off the logits (to base 2) of each scale, and int32 [S] whether that is too wide a range.

    No logit is larger than the bound. A bound that is not a number counts as wide.
    """

    def longest(rows: Rows, normalized: bool) -> Tensor | float:
        return 1.001 if normalized else torch.linalg.vector_norm(rows.rows, dim=1, dtype=torch.float32).amax()

    product = longest(arranged.anchors, p.normalize_anchors)
    if arranged.self_contrast or p.contrasts is None:
        product = product * product
    else:
        product = product * longest(arranged.contrasts, p.normalize_contrasts)
    bounds = arranged.scales.abs() * product
    if p.contrast_bias is not None:
        bounds = bounds + p.contrast_bias.abs().amax() * LOG2E
    return (bounds - HEADROOM).clamp(min=0), (~(bounds <= WIDE)).to(torch.int32)


def _side(p: Problem, statistics: Tensor, pairs: int) -> tuple[Side, Tensor]:
    """One side's fields, from the kernels' statistics [S, 7, n]; and the bases [3, S, n] of its sums, to base 2."""
    base, negative, positive_base, positive, sum_pos, num_pos, inadmissible = statistics.unbind(1)
    # An empty sum says nothing about the base. (A sum that is NaN does.)
    both_base = torch.maximum(base, positive_base)
    both_base = torch.where(negative == 0, positive_base, torch.where(positive == 0, base, both_base))
    everything = negative * (base - both_base).clamp(max=0).exp2()
    everything = everything + positive * (positive_base - both_base).clamp(max=0).exp2()
    sums = {
        "lse_all": (both_base, everything),
        "lse_pos": (positive_base, positive),
        "lse_neg": (base, negative),
    }
    shifts = {name: sums[name][0] * LN2 for name in p.log_sums}
    fields = [sum_pos if name == "sum_pos" else shifts[name] + sums[name][1].log() for name in p.want]
    empty = sum_pos.new_empty(0, *sum_pos.shape)
    parts = empty.new_empty(2, 0, *sum_pos.shape)
    if p.log_sums:
        parts = torch.stack(
            [torch.stack([shifts[name] for name in p.log_sums]), torch.stack([sums[name][1] for name in p.log_sums])]
        )
    counts = torch.stack([num_pos[0], pairs - inadmissible[0] - num_pos[0]])
    return Side(torch.stack(fields) if fields else empty, counts, parts), torch.stack([both_base, base, positive_base])
