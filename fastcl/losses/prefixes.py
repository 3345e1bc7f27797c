"""The losses of all prefixes of `MatryoshkaLoss` from one sweep: the products of a prefix continue those of the last.

It runs in plain PyTorch, in blocks of rows, in place of the backend `chunked` on CPUs. It takes the most common call:
two sets of float32 rows, of which contrast i is the positive of anchor i. In the backward the columns between two
prefixes have one product, with the sum of the weights of all longer prefixes.

The backend `cpu` keeps the loop: its sweeps are fused, and beside them this one gains little or nothing
(`python -m benchmarks.matryoshka`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import values_visible
from ..ops.backends.choose import choose_backend
from ..ops.library import intercepted, once_differentiable, uncompiled, without_autocast
from .formulas import log1p_exp
from .options import LossOptions

LARGEST_SCALE = 44.0  # exp(44) is in float32's range many times over, so that sums need no shift
ORDINARY_NORMS = 1e-6, 1e6  # others need more care than a product of inverse norms
BLOCK, MOST_WEIGHTS = 256, 1 << 23  # rows of a block; numbers of a block's weights


def one_sweep(
    options: LossOptions,
    temperature: float | Tensor,
    anchors: Any,
    contrasts: Any,
    dims: Sequence[int],
    weights: Sequence[float],
) -> Tensor | None:
    """The weighted sum of the mean losses, or None if the call is not one for this sweep."""
    ordered = sorted(zip(dims, weights, strict=True))
    lengths, factors = [d for d, _ in ordered], [weight for _, weight in ordered]
    if len(lengths) == 1 or not _takes(options, anchors, contrasts):
        return None
    value = temperature
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point() or intercepted(temperature):
            return None
        if temperature.device != anchors.device:
            return None
        value = temperature.detach()
    if not 1 / LARGEST_SCALE <= float(value) < math.inf:
        return None
    norms = [_inverse_norms(rows.detach(), lengths) for rows in (anchors, contrasts)]
    if not all(ORDINARY_NORMS[0] < float(bound) < ORDINARY_NORMS[1] for part in norms for bound in part.aminmax()):
        return None
    scale = 1 / temperature.double() if isinstance(temperature, Tensor) else anchors.new_tensor(1 / temperature)
    call = _Call(tuple(lengths), tuple(factors), options.symmetric, *norms)
    found: Tensor = _Prefixes.apply(call, anchors, contrasts, scale.reshape(()).to(torch.float32))
    return found


def _takes(options: LossOptions, anchors: Any, contrasts: Any) -> bool:
    """Whether the options and rows are among those that the sweep computes."""
    usual = LossOptions(symmetric=options.symmetric, gather=options.gather, group=options.group)
    if options != usual or options.gather is not False or not isinstance(contrasts, Tensor):
        return False
    if not all(
        rows.dtype == torch.float32 and rows.dim() == 2 and values_visible(rows) for rows in (anchors, contrasts)
    ):
        return False
    n, m = len(anchors), len(contrasts)
    if anchors.shape[1] != contrasts.shape[1] or n == 0 or (m != n if options.symmetric else m < n):
        return False
    return not intercepted(anchors, contrasts) and choose_backend(anchors.device, torch.float32) == "chunked"


def _inverse_norms(rows: Tensor, dims: Sequence[int]) -> Tensor:
    """[prefixes, N]"""
    squares = torch.stack([rows[:, first:last].square().sum(1) for first, last in _segments(dims)])
    return squares.cumsum(0).rsqrt_()


def _segments(dims: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip((0, *dims), dims, strict=False)


class _Call(NamedTuple):
    dims: tuple[int, ...]  # ascending
    factors: tuple[float, ...]  # weights of the losses
    both: bool
    a: Tensor  # [prefixes, N], inverse norms of the anchors
    c: Tensor  # [prefixes, M]

    def blocks(self) -> Iterator[slice]:
        n, m = self.a.shape[1], self.c.shape[1]
        size = max(BLOCK // 8, min(BLOCK, MOST_WEIGHTS // (len(self.dims) * m)))
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def exponentials(self, rows: slice, x: Tensor, y: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each prefix the products of the block with all contrasts, overwritten by those of the next prefix; the
        exponentials of the logits, 0 for positives; and the positives' logits."""
        products = x.new_zeros(rows.stop - rows.start, len(y))
        block = x[rows]
        for k, (first, last) in enumerate(_segments(self.dims)):
            products.addmm_(block[:, first:last], y[:, first:last].T)
            logits = torch.mul(products, (self.a[k, rows] * scale)[:, None]).mul_(self.c[k])
            diagonal = logits.diagonal(rows.start)
            positives = diagonal.clone()
            logits.exp_()
            diagonal.zero_()
            yield products, logits, positives


class _Prefixes(torch.autograd.Function):
    """sum over prefixes of factor * mean of log(1 + neg / pos), with `both` half of it for each direction."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        count, n, m = len(call.dims), len(x), len(y)
        positives, rows_sums = x.new_empty(count, n), x.new_empty(count, n)
        column_sums = x.new_zeros(count, m if call.both else 0)
        with without_autocast(x.device):
            for rows in call.blocks():
                for k, (_, powers, diagonal) in enumerate(call.exponentials(rows, x, y, scale)):
                    positives[k, rows] = diagonal
                    torch.sum(powers, 1, out=rows_sums[k, rows])
                    if call.both:
                        column_sums[k] += powers.sum(0)
        ctx.call = call
        ctx.save_for_backward(x, y, scale, positives, rows_sums, column_sums)
        sides = [rows_sums, column_sums] if call.both else [rows_sums]
        losses = torch.stack([log1p_exp(sums.log() - positives).mean(1) for sums in sides]).mean(0)
        return (losses * losses.new_tensor(call.factors)).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work = partial(_Prefixes.gradients, ctx)
        return None, *once_differentiable("contrastive_stats", work, grad, *ctx.saved_tensors)

    @staticmethod
    @uncompiled
    def gradients(ctx: Any, grad: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, positives, row_sums, column_sums = saved
        call: _Call = ctx.call
        _, of_x, of_y, _ = ctx.needs_input_grad
        count, n = len(call.dims), len(x)
        factors = grad * x.new_tensor(call.factors)[:, None] / (n * (2 if call.both else 1))
        powers = positives.exp()
        of_rows = factors / (powers + row_sums)  # the derivative in an exponential
        of_columns = factors / (powers + column_sums) if call.both else column_sums
        of_positives = -of_rows * row_sums
        if call.both:
            of_positives = of_positives - of_columns * column_sums
        dx, dy = torch.empty_like(x), torch.zeros_like(y)
        dx[:, call.dims[-1] :] = 0
        along_x, along_y = torch.empty_like(call.a), torch.zeros_like(call.c)
        with without_autocast(x.device):
            for rows in call.blocks():
                weights = []
                for k, (products, g, _) in enumerate(call.exponentials(rows, x, y, scale)):
                    g *= of_rows[k, rows, None] + of_columns[k] if call.both else of_rows[k, rows, None]
                    g.diagonal(rows.start).copy_(of_positives[k, rows])
                    g.mul_(call.a[k, rows, None]).mul_(call.c[k])  # now the derivative in products, without the scale
                    terms = products * g
                    torch.sum(terms, 1, out=along_x[k, rows])
                    along_y[k] += terms.sum(0)
                    weights.append(g)
                for k in range(count - 2, -1, -1):
                    weights[k] += weights[k + 1]
                for g, (first, last) in zip(weights, _segments(call.dims), strict=True):
                    if of_x:
                        dx[rows, first:last] = g @ y[:, first:last]
                    if of_y:
                        dy[:, first:last].addmm_(g.T, x[rows, first:last])
        for rows_of, gradient, along, norms in ((x, dx, along_x, call.a), (y, dy, along_y, call.c)):
            for d, one, norm in zip(call.dims, along, norms, strict=True):
                gradient[:, :d] -= rows_of[:, :d] * (one * norm.square())[:, None]
            gradient *= scale
        return dx if of_x else None, dy if of_y else None, along_x.double().sum().to(scale.dtype)
