"""The sum over all pairs of small calls on a CPU as one node of autograd's graph that begins at the caller's tensors.

As in `contrastive.small`, one call of the engine computes it and all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import native
from ..backends.choose import chooses_cpu
from ..backends.small import constant, gradient_of, number_of, rows_of, scaled
from ..pair_maps import KINDS

MOST = 1 << 25  # up to this N M D: beyond, the sweep takes longer than all that surrounds it


class _Call(NamedTuple):
    """What the engine needs besides rows."""

    clusters: Tensor  # [N] int64, contiguous; in self-contrast negative numbers mean none, else only -1
    contrast_clusters: Tensor | None  # [M]
    scale: Tensor  # []
    inverted: bool  # gradients are those of the temperature
    offset: Tensor  # []
    normalize: bool
    map: int
    weight: float


class SmallTotal(torch.autograd.Function):
    """The sum over all pairs times a weight. learned, offset: tensors of the scale or temperature, and of the offset.

    The first backward gives the gradients away that the forward has computed; another one calls the engine again.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, anchors: Tensor, contrasts: Tensor | None, learned: Tensor | None, offset: Tensor | None
    ) -> Tensor:
        total, ctx.ready = _run(call, ctx.needs_input_grad, anchors, contrasts)
        ctx.call = call
        ctx.save_for_backward(anchors, contrasts, learned, offset, *call[:2])  # torch checks that they are unchanged
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            _, ready = _run(ctx.call, ctx.needs_input_grad, *saved[:2])
        return None, *scaled(grad, saved[:4], ready)


# Without what `apply` does for functorch and for default arguments: `intercepted` has seen that there is neither.
_apply = super(torch.autograd.Function, SmallTotal).apply


def _run(
    call: _Call, needs: Sequence[bool], anchors: Tensor, contrasts: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The total, and the needed gradients of anchors, contrasts, what the scale is learned by, and offset."""
    clusters, contrast_clusters, scale, inverted, offset, normalize, kind, weight = call
    own, other = rows_of(anchors), (0, 0, 0, 0, 0) if contrasts is None else rows_of(contrasts)
    dtype, n, d, two = scale.dtype, own[2], anchors.shape[-1], contrasts is not None
    threads = native.threads(n * (other[2] if two else n) * d, native.PRODUCTS, any(needs))
    address = native.address
    described = (
        *own, *other, d, clusters.data_ptr(), address(contrast_clusters), 0, 0, scale.data_ptr(), 1, 0,
        normalize, normalize and two, dtype == torch.float64, False, threads, 0,
    )  # fmt: skip
    total = torch.empty_like(scale)
    of_own = gradient_of(anchors, dtype) if needs[1] else None
    of_other = gradient_of(contrasts, dtype) if needs[2] and contrasts is not None else None
    of_scale = torch.empty_like(scale) if needs[3] else None
    of_offset = torch.empty_like(scale) if needs[4] else None
    numbers = (
        kind, False, offset.data_ptr(), False, constant(weight, dtype, (2, n)).data_ptr(), 0, 0, 0,
        address(of_own), address(of_other), address(of_scale), address(of_offset), 0,
    )  # fmt: skip
    native.run(
        native.native_module().pairs(native.engine()[0], described, numbers, 0.0, 0.0, total.data_ptr(), True, not two)
    )
    if of_scale is not None and inverted:
        of_scale.mul_(scale * scale).neg_()
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
    """The sum over all pairs times `weight`; None if the call is not small, or if the engine is not to compute it.

    Tensors are on the CPU and not `intercepted`.

    anchors: [N, D], or [N, V, D] as N * V rows. clusters, contrast_clusters: [N * V] and [M], as in `_Call`. scale:
    positive; tensors have one element. inverted: it is the temperature. offset: added to the logits. kind: a map of
    logits without margins.
    """
    if anchors.dim() == 3 and not anchors.is_contiguous():
        return None
    numbers, width = anchors.numel(), anchors.shape[-1]
    products = numbers * (numbers if contrasts is None else contrasts.numel()) // width
    learned = scale if isinstance(scale, Tensor) else None
    shift = offset if isinstance(offset, Tensor) else None
    if not 0 < products <= MOST or not chooses_cpu():
        return None
    dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    if contrasts is not None and (dtype == torch.float64) != (contrasts.dtype == torch.float64):
        return None
    if learned is None:
        number = constant(1 / scale if inverted else scale, dtype)
    else:
        number = number_of(learned, dtype)
        number = number.reciprocal() if inverted else number
    added = constant(offset, dtype) if shift is None else number_of(shift, dtype)
    map_number = KINDS[kind].number
    call = _Call(clusters, contrast_clusters, number, inverted, added, normalize, map_number, weight)
    if torch.is_grad_enabled() and (
        anchors.requires_grad
        or (contrasts is not None and contrasts.requires_grad)
        or (learned is not None and learned.requires_grad)
        or (shift is not None and shift.requires_grad)
    ):
        total: Tensor = _apply(call, anchors, contrasts, learned, shift)
        return total
    return _run(call, (False,) * 5, anchors, contrasts)[0]
