"""Backend ``cpu`` of the statistics over soft assignments: calls the C++ engine with addresses of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..contrastive import chunked
from ..contrastive import cpu as contrastive_cpu
from ..contrastive.records import Gradients, Needs, Problem, Side, Statistics, empty_side, new_side

ALIGNMENT = 64  # of kept weights, in bytes; torch's own memory has it
FEWEST_COLUMNS = 256  # weights of shorter assignments are found again as fast as they are read


def keeps_weights(p: Problem) -> bool:
    """Whether the forward may keep the weights of all pairs: no more numbers than both sets' rows and assignments have.

    In self-contrast one set counts as both, but only pairs above the diagonal are written.
    """
    assert p.anchors.assignments is not None
    (_, n, m), c = p.sizes, p.anchors.assignments.shape[1]
    return c >= FEWEST_COLUMNS and n * m <= (n + m) * (p.anchors.values.shape[1] + c)


def forward(p: Problem, keep: bool = False) -> Statistics:
    """keep: for a backward, which then does not compute the weights again. They are `Statistics.saved`."""
    p = contrastive_cpu.addressable(p)
    _, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.forward(p)
    new = p.logit_scale.new_empty
    a = new(n if p.anchors.normalize else 0)
    c = new(m if p.contrasts is not None and p.contrasts.normalize else 0).zero_()  # written with `both`, never read
    anchors = new_side(p, n)
    contrasts = new_side(p, m) if p.both else empty_side(p)
    weights = new(kept_numbers(p) if keep and keeps_weights(p) else 0)
    if native.address(weights) % ALIGNMENT:
        weights = new(0)
    _run(p, weights, _side(anchors, a), _side(contrasts, c) if p.both else None, None)
    return Statistics(anchors, contrasts, a, c, weights)


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """The gradients, from those of the anchors' fields [2, 1, N] and, with `both`, of the contrasts' [2, 1, M]."""
    p = contrastive_cpu.addressable(p)
    _, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.backward(p, saved, grad, grad_contrasts, needs)
    new = p.logit_scale.new_empty
    bias = needs.bias and p.others.bias is not None
    # Self-contrast with a bias runs as two sets. Both gradients belong to the anchors.
    folded = p.contrasts is None and p.anchors.bias is not None
    rows = new(p.anchors.values.shape) if needs.anchors else None
    columns = None
    if needs.anchors if folded else needs.contrasts and p.contrasts is not None:
        columns = new(p.others.values.shape)
    scale = new(1, dtype=torch.float64) if needs.logit_scale else None
    d_bias = new(m) if bias else None
    own = _gradient_side(saved.anchors, grad)
    other = _gradient_side(saved.contrasts, grad_contrasts) if p.both else None
    _run(p, saved.saved, own, other, tuple(map(native.address, (rows, columns, scale, d_bias))))
    if folded and rows is not None and columns is not None:
        rows, columns = rows.add_(columns), None
    return Gradients(rows, columns, scale, d_bias)


def kept_numbers(p: Problem) -> int:
    """How many numbers kept weights are; the length of a row as `KeptProducts` in csrc/problem.h has it."""
    _, n, m = p.sizes
    return n * ((m + 31) // 32 * 32 + 16)


def _run(
    p: Problem, weights: Tensor, anchors: tuple[int, ...], contrasts: tuple[int, ...] | None, gradients: Any
) -> None:
    """weights: kept by the forward, for the backward; [0]: not kept."""
    swept, same_rows = contrastive_cpu.two_sets_if_asymmetric(p)
    own = p.anchors.assignments
    other = swept.contrasts and swept.contrasts.assignments  # None in self-contrast
    assert own is not None
    if weights.dtype != p.dtype or weights.shape != (kept_numbers(p),):  # none, or a hook's
        kept = 0
    else:
        if not weights.is_contiguous() or native.address(weights) % ALIGNMENT:  # a hook has moved them
            weights = torch.empty_like(weights, memory_format=torch.contiguous_format).copy_(weights)
        kept = native.address(weights)
    assignments = (*native.describe_rows(own), *native.describe_rows(other), own.shape[1], kept)
    problem = contrastive_cpu.describe(swept, p.anchors.values.shape[1] + own.shape[1], same_rows)
    call = native.native_module().soft(native.engine()[0], problem, assignments, anchors, contrasts, gradients)
    native.run(call)


# Tuples of numbers, in the order in which csrc/bindings reads them.


def _side(side: Side, inverse_norms: Tensor) -> tuple[int, ...]:
    """The addresses that the forward writes."""
    (lse, total), counts, (base, power) = side.fields, side.counts, side.parts
    norms = inverse_norms if len(inverse_norms) else None
    return (*map(native.address, (lse, total, *counts, base, power, norms)), 0, 0)


def _gradient_side(side: Side, grad: Tensor) -> tuple[int, ...]:
    """The addresses that the backward reads."""
    return (0, 0, 0, 0, *map(native.address, side.parts), 0, *map(native.address, grad))
