"""The mean loss of small calls on a CPU as one node of autograd's graph that begins at the caller's tensors.

For few rows operators, records and arguments would take longer than the engine. Here one call of it computes the loss
and all gradients. `replayed` is the same for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import native
from ..small import as_saved, described, gradient_of, is_small, needs_gradient, real_of, rows_of, scale_of, scaled
from . import direct


class _Call(NamedTuple):
    """What the engine needs besides rows."""

    clusters: Tensor  # [N] int64, contiguous; in self-contrast negative numbers mean none, else only -1
    contrast_clusters: Tensor | None  # [M]
    scale: Tensor  # []
    inverted: bool  # gradients are those of the temperature
    normalize: bool
    symmetric: bool
    negatives_only: bool


class SmallMean(torch.autograd.Function):
    """The loss of `direct.DirectMean`. learned: the tensor of the scale or temperature.

    The first backward gives the gradients away that the forward has computed; another one calls the engine again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        anchors: Tensor,
        contrasts: Tensor | None,
        hard_negatives: Tensor | None,
        learned: Tensor | None,
    ) -> Tensor:
        loss, ctx.ready = _run(call, ctx.needs_input_grad, anchors, contrasts, hard_negatives)
        ctx.call = call
        # torch checks that they are unchanged
        ctx.save_for_backward(anchors, contrasts, hard_negatives, learned, *call[:2])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            anchors, contrasts, hard_negatives = map(as_saved, saved[:3])
            if hard_negatives is not None:
                anchors = anchors.contiguous()
            _, ready = _run(ctx.call, ctx.needs_input_grad, anchors, contrasts, hard_negatives)
        return None, *scaled(grad, saved[:4], ready)


# Without what `apply` does for functorch and for default arguments: `intercepted` has seen that there is neither.
_apply = super(torch.autograd.Function, SmallMean).apply


def _run(
    call: _Call, needs: Sequence[bool], anchors: Tensor, contrasts: Tensor | None, hard_negatives: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss, and the needed gradients of anchors, contrasts, hard negatives and what is learned."""
    clusters, contrast_clusters, scale, inverted, normalize, symmetric, negatives_only = call
    dtype, address = scale.dtype, native.address
    problem = described(anchors, contrasts, clusters, contrast_clusters, scale, normalize, symmetric, any(needs))
    loss = torch.empty_like(scale)
    of_own = gradient_of(anchors, dtype) if needs[1] else None
    of_other = gradient_of(contrasts, dtype) if needs[2] and contrasts is not None else None
    of_scale = torch.empty_like(scale) if needs[4] else None
    outputs = (
        negatives_only, 0, 0, 0, loss.data_ptr(), 0, 0, 0, address(of_own), address(of_other), address(of_scale), 0
    )  # fmt: skip
    of_hard = given = None
    if hard_negatives is not None:
        of_hard = torch.empty_like(hard_negatives) if needs[3] else None
        d = hard_negatives.shape[-1]
        place = native.DTYPES[dtype], hard_negatives.data_ptr(), hard_negatives.numel() // d, d, 1
        given = *place, address(of_hard)
    native.run(native.native_module().mean(native.engine()[0], problem, outputs, True, contrasts is None, None, given))
    if of_scale is not None and inverted:
        of_scale.mul_(scale * scale).neg_()
    return loss, (of_own, of_other, of_hard, of_scale)


def mean_loss(
    anchors: Tensor,
    contrasts: Tensor | None,
    clusters: Tensor,
    contrast_clusters: Tensor | None,
    scale: float | Tensor,
    *,
    inverted: bool,
    normalize: bool,
    symmetric: bool,
    negatives_only: bool,
    hard_negatives: Tensor | None = None,
) -> Tensor | None:
    """The loss of `direct.DirectMean`; None if the call is not small.

    Tensors are on the CPU and not `intercepted`, and `choose.chooses_cpu`.

    anchors: [N, D], or [N, V, D] as N * V rows. clusters, contrast_clusters: [N * V] and [M], as in `_Call`. scale:
    positive; a tensor has one element. inverted: it is the temperature. negatives_only: sums are over the negatives.
    hard_negatives: contiguous, [N, H, D] or [N, V, H, D], H not 0.
    """
    if not is_small(anchors, contrasts, direct.AT_ONCE):
        return None
    if hard_negatives is not None and not _together(anchors, hard_negatives):
        return None
    number, learned = scale_of(scale, inverted, real_of(anchors))
    call = _Call(clusters, contrast_clusters, number, inverted, normalize, symmetric, negatives_only)
    if needs_gradient(anchors, contrasts, hard_negatives, learned):
        loss: Tensor = _apply(call, anchors, contrasts, hard_negatives, learned)
        return loss
    return _run(call, (False,) * 5, anchors, contrasts, hard_negatives)[0]


def _together(anchors: Tensor, hard_negatives: Tensor) -> bool:
    """Whether the engine takes hard negatives of these anchors: few, and both whole rows in the dtype of the sums."""
    real = real_of(anchors)
    return (
        anchors.dtype == hard_negatives.dtype == real
        and anchors.stride(-1) == 1
        and hard_negatives.numel() <= direct.AT_ONCE
    )


# A queue.


class _QueueCall(NamedTuple):
    contrasts: Tensor  # [M, D], whose rows are all negatives
    scale: Tensor  # []
    inverted: bool
    normalize: bool
    normalize_contrasts: bool


class SmallQueueMean(torch.autograd.Function):
    """The mean of log(1 + neg_i / pos_i) with a positive of its own for each anchor (MoCo).

    It keeps its gradients for further backwards and not the contrasts, so that a queue may change in between.
    """

    @staticmethod
    def forward(ctx: Any, call: _QueueCall, anchors: Tensor, positives: Tensor, learned: Tensor | None) -> Tensor:
        loss, ready = _run_queue(call, ctx.needs_input_grad, anchors, positives)
        ctx.save_for_backward(anchors, positives, learned, *ready)  # torch checks, and frees them
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return None, *scaled(grad, saved[:3], saved[3:], keep=True)


_apply_queue = super(torch.autograd.Function, SmallQueueMean).apply


def _run_queue(
    call: _QueueCall, needs: Sequence[bool], anchors: Tensor, positives: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss, and the needed gradients of anchors, positives and what is learned."""
    contrasts, scale, inverted, normalize, normalize_contrasts = call
    dtype, address = scale.dtype, native.address
    own, other = rows_of(anchors), rows_of(contrasts)
    d = anchors.shape[1]
    threads = native.threads(own[2] * other[2] * d, native.PRODUCTS, any(needs))
    wide = dtype == torch.float64
    problem = (
        *own, *other, d, 0, 0, 0, 0, scale.data_ptr(), 1, 0, normalize, normalize_contrasts, wide, False, threads, 0
    )  # fmt: skip
    loss = torch.empty_like(scale)
    of_own = gradient_of(anchors, dtype) if needs[1] else None
    of_positives = gradient_of(positives, dtype) if needs[2] else None
    of_scale = torch.empty_like(scale) if needs[3] else None
    outputs = True, 0, 0, 0, loss.data_ptr(), 0, 0, 0, address(of_own), 0, address(of_scale), 0
    given = *rows_of(positives), address(of_positives)
    native.run(native.native_module().mean(native.engine()[0], problem, outputs, True, False, given))
    if of_scale is not None and inverted:
        of_scale.mul_(scale * scale).neg_()
    return loss, (of_own, of_positives, of_scale)


def queue_loss(
    anchors: Tensor,
    positives: Tensor,
    contrasts: Tensor,
    scale: float | Tensor,
    *,
    inverted: bool,
    normalize: bool,
    normalize_contrasts: bool,
) -> Tensor | None:
    """The mean of log(1 + neg_i / pos_i); None for rows or a size that one call of the engine does not take.

    Tensors are on the CPU and not `intercepted`, and `choose.chooses_cpu`.

    anchors, positives: [N, D], of one dtype. contrasts: [M, D]; no gradient flows to them. scale: as in `mean_loss`.
    """
    real = real_of(anchors)
    if anchors.dtype != real or positives.dtype != real or anchors.stride(1) != 1 or positives.stride(1) != 1:
        return None
    number, learned = scale_of(scale, inverted, real)
    # Two calls form a learned scale's gradient only if there is a backward; others come out of the sweep for the loss.
    if needs_gradient(learned) and not is_small(anchors, contrasts, direct.AT_ONCE):
        return None
    call = _QueueCall(contrasts, number, inverted, normalize, normalize_contrasts)
    if learned is not None and not learned.requires_grad:
        learned = None  # it may change before the backward
    if needs_gradient(anchors, positives, learned):
        loss: Tensor = _apply_queue(call, anchors, positives, learned)
        return loss
    return _run_queue(call, (False,) * 4, anchors, positives)[0]
