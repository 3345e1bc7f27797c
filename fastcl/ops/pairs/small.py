"""Sums and means over pairs of small calls on a CPU: one node of autograd's graph that begins at the caller's tensors.

As in `contrastive.small`, the engine computes them and all gradients in the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import native
from ..pair_maps import KINDS
from ..small import as_saved, constant, described, gradient_of, is_small, needs_gradient, real_of, scale_of, scaled


class _Call(NamedTuple):
    """What the engine needs besides rows."""

    clusters: Tensor  # [N] int64, contiguous; in self-contrast negative numbers mean none, else only -1
    contrast_clusters: Tensor | None  # [M]
    scale: Tensor  # []; 1 for distances
    inverted: bool  # gradients are those of the temperature
    offset: Tensor | None  # []
    normalize: bool
    kind: str  # of `pair_maps.KINDS`
    margins: tuple[float, float] = (0.0, 0.0)


class SmallTotal(torch.autograd.Function):
    """The sum over all pairs times a weight. learned, offset: tensors of the scale or temperature, and of the offset.

    The first backward gives the gradients away that the forward has computed; another one calls the engine again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        weight: float,
        anchors: Tensor,
        contrasts: Tensor | None,
        learned: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        total, ctx.ready = _total(call, weight, ctx.needs_input_grad, anchors, contrasts)
        ctx.call = call, weight
        ctx.save_for_backward(anchors, contrasts, learned, offset, *call[:2])  # torch checks that they are unchanged
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            call, weight = ctx.call
            _, ready = _total(call, weight, ctx.needs_input_grad, *map(as_saved, saved[:2]))
        return None, None, *scaled(grad, saved[:4], ready)


class SmallMeans(torch.autograd.Function):
    """The mean over positive pairs plus the mean over negative pairs: over all pairs, or over those that are not 0."""

    @staticmethod
    def forward(ctx: Any, call: _Call, active: bool, anchors: Tensor, contrasts: Tensor | None) -> Tensor:
        loss, ctx.ready = _means(call, active, ctx.needs_input_grad, anchors, contrasts)
        ctx.call = call, active
        ctx.save_for_backward(anchors, contrasts, *call[:2])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            call, active = ctx.call
            _, ready = _means(call, active, ctx.needs_input_grad, *map(as_saved, saved[:2]))
        return None, None, *scaled(grad, saved[:2], ready)


# Without what `apply` does for functorch and for default arguments: `intercepted` has seen that there is neither.
_apply_total = super(torch.autograd.Function, SmallTotal).apply
_apply_means = super(torch.autograd.Function, SmallMeans).apply


def _total(
    call: _Call, weight: float, needs: Sequence[bool], anchors: Tensor, contrasts: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The total, and the needed gradients of anchors, contrasts, what the scale is learned by, and offset."""
    weights = constant(weight, call.scale.dtype, (2, anchors.numel() // anchors.shape[-1]))
    total, found = _sweep(call, weights, needs[2:], anchors, contrasts)
    of_scale = found[2]
    if of_scale is not None and call.inverted:
        of_scale.mul_(call.scale * call.scale).neg_()
    return total, found


def _means(
    call: _Call, active: bool, needs: Sequence[bool], anchors: Tensor, contrasts: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The means, and the needed gradients of anchors and contrasts.

    The divisors are known after the sweep. Positives lie in few tiles, so they have a sweep of their own.
    """
    n, dtype = anchors.numel() // anchors.shape[-1], call.scale.dtype
    flags = *needs[2:], False, False
    sums = torch.empty((3, 2, n), dtype=dtype, device="cpu")
    negative, found = _sweep(call, _one_kind(n, dtype, False), flags, anchors, contrasts, sums)
    counts = sums[1 if active else 2].sum(1, dtype=torch.float64).tolist()
    positive, others = _sweep(call, _one_kind(n, dtype, True), flags, anchors, contrasts, None, True)
    of_positives, of_negatives = (1 / max(count, 1) for count in counts)
    loss = negative.fill_(positive.item() * of_positives + negative.item() * of_negatives)
    for gradient, other in zip(found, others, strict=True):
        if gradient is not None and other is not None:
            gradient.mul_(of_negatives).add_(other, alpha=of_positives)
    return loss, found[:2]


@lru_cache(maxsize=32)
def _one_kind(n: int, dtype: torch.dtype, positives: bool) -> Tensor:
    """Weights [2, N]: 1 for sums over positives or for those over negatives, else 0. They are only read."""
    with torch.inference_mode(False):
        weights = torch.zeros(2, n, dtype=dtype, device="cpu")
        weights[0 if positives else 1] = 1
        return weights


def _sweep(
    call: _Call,
    weights: Tensor,
    needs: Sequence[bool],
    anchors: Tensor,
    contrasts: Tensor | None,
    sums: Tensor | None = None,
    only_positives: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The weighted total, and the needed gradients of anchors, contrasts, scale and offset.

    sums: [3, 2, N], receives those of `records.Sums`.
    """
    clusters, contrast_clusters, scale, _, offset, normalize, kind, margins = call
    dtype, address = scale.dtype, native.address
    problem = described(anchors, contrasts, clusters, contrast_clusters, scale, normalize, False, any(needs))
    total = torch.empty_like(scale)
    of_own = gradient_of(anchors, dtype) if needs[0] else None
    of_other = gradient_of(contrasts, dtype) if needs[1] and contrasts is not None else None
    of_scale = torch.empty_like(scale) if needs[2] else None
    of_offset = torch.empty_like(scale) if needs[3] else None
    first, row = address(sums), 0 if sums is None else sums[0].nbytes
    numbers = (
        KINDS[kind].number, only_positives, address(offset), False, weights.data_ptr(), first, first + row,
        first + 2 * row, address(of_own), address(of_other), address(of_scale), address(of_offset), 0,
    )  # fmt: skip
    pairs = native.native_module().pairs
    native.run(pairs(native.engine()[0], problem, numbers, *margins, total.data_ptr(), True, contrasts is None))
    return total, (of_own, of_other, of_scale, of_offset)


def total_of(
    anchors: Tensor,
    contrasts: Tensor | None,
    clusters: Tensor,
    contrast_clusters: Tensor | None,
    scale: float | Tensor,
    offset: float | Tensor,
    *,
    inverted: bool,
    normalize: bool,
    kind: str,
    weight: float,
) -> Tensor | None:
    """The sum over all pairs times `weight`; None if the call is not small.

    Tensors are on the CPU and not `intercepted`, and `choose.chooses_cpu`.

    anchors: [N, D], or [N, V, D] as N * V rows. clusters, contrast_clusters: [N * V] and [M], as in `_Call`. scale:
    positive; tensors have one element. inverted: it is the temperature. offset: added to the logits. kind: a map of
    logits without margins.
    """
    if not is_small(anchors, contrasts):
        return None
    number, learned = scale_of(scale, inverted, real_of(anchors))
    added, shift = scale_of(offset, False, number.dtype)
    call = _Call(clusters, contrast_clusters, number, inverted, added, normalize, kind)
    if needs_gradient(anchors, contrasts, learned, shift):
        total: Tensor = _apply_total(call, weight, anchors, contrasts, learned, shift)
        return total
    return _total(call, weight, (False,) * 6, anchors, contrasts)[0]


def means_of(
    anchors: Tensor,
    contrasts: Tensor | None,
    clusters: Tensor,
    contrast_clusters: Tensor | None,
    *,
    normalize: bool,
    kind: str,
    margins: tuple[float, float],
    active: bool,
) -> Tensor | None:
    """The mean over positive pairs plus the mean over negative pairs; None as in `total_of`, which has the tensors.

    kind: a map with margins. active: over the pairs whose value is not 0.
    """
    if not is_small(anchors, contrasts):
        return None
    one = constant(1.0, real_of(anchors))
    call = _Call(clusters, contrast_clusters, one, False, None, normalize, kind, margins)
    if needs_gradient(anchors, contrasts):
        loss: Tensor = _apply_means(call, active, anchors, contrasts)
        return loss
    return _means(call, active, (False,) * 4, anchors, contrasts)[0]
