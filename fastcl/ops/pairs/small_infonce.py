"""InfoNCE as a mean over pairs, of small calls on a CPU: one node of autograd's graph, as in `small`.

The forward calls the engine three times. The first call gives lse_neg of each anchor; the second visits the tiles with
positives, for the loss and its gradient in the logits of positives and in lse_neg; the third takes the latter to the
rows. `losses/pair_form.py` has the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import native
from ..pair_maps import FAR, KINDS
from ..small import as_saved, described, gradient_of, is_small, needs_gradient, places, real_of, scale_of, scaled


class _Call(NamedTuple):
    """What the engine needs besides rows."""

    clusters: Tensor  # [N] int64, contiguous; in self-contrast negative numbers mean none, else only -1
    contrast_clusters: Tensor | None  # [M]
    scale: Tensor  # []
    inverted: bool  # gradients are those of the temperature
    normalize: bool
    margin: float


class SmallPairMean(torch.autograd.Function):
    """The mean over pairs of an anchor and a positive. learned: the tensor of the scale or temperature.

    The first backward gives the gradients away that the forward has computed; another one calls the engine again.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, anchors: Tensor, contrasts: Tensor | None, learned: Tensor | None) -> Tensor:
        loss, ctx.ready = _run(call, ctx.needs_input_grad, anchors, contrasts)
        ctx.call = call
        ctx.save_for_backward(anchors, contrasts, learned, *call[:2])  # torch checks that they are unchanged
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            _, ready = _run(ctx.call, ctx.needs_input_grad, *map(as_saved, saved[:2]))
        return None, *scaled(grad, saved[:3], ready)


# Without what `apply` does for functorch and for default arguments: `intercepted` has seen that there is neither.
_apply = super(torch.autograd.Function, SmallPairMean).apply


def _run(
    call: _Call, needs: Sequence[bool], anchors: Tensor, contrasts: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss, and the needed gradients of anchors, contrasts and what is learned."""
    clusters, contrast_clusters, scale, inverted, normalize, margin = call
    dtype, alone = scale.dtype, contrasts is None
    # Gradients of two calls cancel, and are added before they are rounded to the rows' dtype.
    own = anchors if anchors.dtype == dtype else anchors.to(dtype)
    other = own if contrasts is None else contrasts if contrasts.dtype == dtype else contrasts.to(dtype)
    clusters = clusters.clamp(min=-1) if alone else clusters
    others = clusters if contrast_clusters is None else contrast_clusters
    n, learns = len(clusters), any(needs)
    module, engine = native.native_module(), native.engine()[0]

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    # Fields, shifts and sums of lse_neg, counts, what the backward needs; weights of positives and of negatives.
    rows = new(10, n)
    lse, num_pos, num_neg, weights = rows[0], rows[3], rows[4], rows[8:]
    place = [rows.data_ptr() + k * lse.nbytes for k in range(8)]
    statistics = 0, 0, place[0], 0, 0, 0, place[1], 0, 0, place[2], *place[3:], 0, 0
    problem = described(own, None if alone else other, clusters, contrast_clusters, scale, normalize, False, learns)
    native.run(module.forward(engine, problem, statistics, None, (0, 0)))

    offset = lse.masked_fill(num_neg == 0, -FAR).neg_()  # rows without negatives have terms of 0
    if margin:
        offset.sub_(scale, alpha=margin)
    weights[0] = num_neg > 0
    weights[1] = 0
    count = max(num_pos.sum(dtype=torch.float64).item(), 1)  # of pairs; what it divides is rounded once
    # An offset of rows breaks the symmetry of self-contrast: the anchors are both sets, and their places are ids.
    ids = places(n, 1, n) if alone else None
    pairs = described(own, other, clusters, others, scale, normalize, False, learns, ids)
    loss = torch.empty_like(scale)
    of_own = gradient_of(own, dtype) if needs[1] else None
    of_other = gradient_of(other, dtype) if needs[1 if alone else 2] else None
    of_scale, of_offset = new(dtype=torch.float64) if needs[3] else None, new(n, dtype=torch.float64)
    address = native.address
    numbers = (
        KINDS["softplus"].number, True, offset.data_ptr(), True, weights.data_ptr(), 0, 0, 0, address(of_own),
        address(of_other), address(of_scale), address(of_offset) if learns else 0, 0,
    )  # fmt: skip
    native.run(module.pairs(engine, pairs, numbers, 0.0, 0.0, loss.data_ptr()))
    loss.div_(count)
    if not learns:
        return loss, (None, None, None)

    lse.copy_(torch.neg(of_offset, out=of_offset))
    found = [of_own, None if alone else of_other, of_scale]
    added = [None if gradient is None else torch.empty_like(gradient) for gradient in found]
    native.run(module.backward(engine, problem, statistics, None, (0, 0, True, *map(address, added), 0)))
    # In the sums' dtype: so the scale's parts, which are doubles, may cancel to 0.
    found = [
        None if gradient is None or more is None else gradient.to(dtype).add_(more.to(dtype))
        for gradient, more in zip(found, added, strict=True)
    ]
    if alone and of_own is not None and of_other is not None:
        of_own.add_(of_other)
    if (of_scale := found[2]) is not None:
        if margin:
            of_scale.add_(of_offset.sum(), alpha=margin)
        if inverted:
            of_scale.mul_(scale * scale).neg_()
    for gradient in found:
        if gradient is not None:
            gradient.mul_(1 / count)
    return loss, tuple(found)


def mean_of_pairs(
    anchors: Tensor,
    contrasts: Tensor | None,
    clusters: Tensor,
    contrast_clusters: Tensor | None,
    scale: float | Tensor,
    *,
    inverted: bool,
    normalize: bool,
    margin: float,
) -> Tensor | None:
    """The mean over pairs (i, p) of log(1 + sum_{j in N_i} exp(s_ij - s_ip + scale * margin)); None if it is not small.

    Arguments are as those of `contrastive.small.mean_loss`.
    """
    if not is_small(anchors, contrasts):
        return None
    number, learned = scale_of(scale, inverted, real_of(anchors))
    call = _Call(clusters, contrast_clusters, number, inverted, normalize, margin)
    if needs_gradient(anchors, contrasts, learned):
        loss: Tensor = _apply(call, anchors, contrasts, learned)
        return loss
    return _run(call, (False,) * 4, anchors, contrasts)[0]
