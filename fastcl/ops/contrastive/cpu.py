"""Backend ``cpu``: the contrastive statistics by the C++ SIMD engines of ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import native
from ..backends.native import address, describe_rows
from . import chunked
from .fields import LOG_SUMS, SWEPT
from .observed import PARTS
from .records import Gradients, Needs, Problem, Rows, Side, Statistics, empty_side, largest_base, new_side

_PLACES = {name: k for k, name in enumerate(SWEPT)}
_MEAN_KEPT = 9  # as in csrc/cpu/contrastive/mean.h
_NOTHING = Needs()


def saved_size(p: Problem) -> int:
    """How many numbers the forward saves for the backward.

    For each row: the sum over the negatives / the sum over the positives, and the largest logit (to base 2) of the
    negatives and of the positives: [3, S, N], then [3, S, M] with `both`. If only the anchors need a gradient, also the
    softmax-weighted sums of contrasts [N, D], and whether they are valid [1].
    """
    s, n, m = p.sizes
    return 3 * s * (n + m if p.both else n) + _weighted_size(p)


def plane_count(p: Problem) -> int:
    return 3


def planes(p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the part of `saved` that blocks of contrasts merge: [3, S, N] and, with `both`, [3, S, M]."""
    s, n, m = p.sizes
    rows, columns = saved[: 3 * s * n], saved[3 * s * n :][: 3 * s * m if p.both else 0]
    return rows.view(3, s, n), columns.view(3, s, m if p.both else 0)


def merge_planes(found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
    """Planes [B, 3, S, N] of B blocks -> [3, S, N].

    counts: of each block, [B, 2, N]. sums: over all contrasts, around one base, [B, S, N]; None without lse_all, when
    the ratio is not used.
    """
    ratio = torch.zeros_like(found[0, 0])
    if sums is not None:
        of_block = torch.where(sums != 0, found[:, 0], 0)
        positive = (sums / (1 + of_block)).sum(0)
        negative = torch.where(of_block != 0, sums / (1 + 1 / of_block), 0).sum(0)
        ratio = torch.where(negative != 0, negative / positive, 0)
    positives, negatives = (counts > 0).unbind(1)
    return torch.stack([ratio, largest_base(found[:, 1], negatives), largest_base(found[:, 2], positives)])


def _weighted(p: Problem) -> bool:
    return p.anchors_only and p.sizes[0] == 1


def _weighted_size(p: Problem) -> int:
    return p.anchors.values.shape[0] * p.anchors.values.shape[1] + 1 if _weighted(p) else 0


def forward(p: Problem) -> Statistics:
    p = addressable(p)
    _, n, m = p.sizes
    new = p.logit_scale.new_empty
    saved = new(saved_size(p))
    if n == 0 or m == 0:
        return chunked.forward(p)._replace(saved=saved)
    a = new(n if p.anchors.normalize else 0)
    c = new(m if p.contrasts is not None and p.contrasts.normalize else 0)
    anchors = _new_side(p, n)
    contrasts = _new_side(p, m) if p.both else empty_side(p)
    swept, same_rows = two_sets_if_asymmetric(p)
    own, other = _sides(p, anchors, contrasts, saved)
    sides = (*own, address(a)), other and (*other, address(c))
    native.run(
        native.native_module().forward(
            native.engine()[0], describe(swept, same_rows=same_rows), *sides, _weighted_sums(p, saved)
        )
    )
    return Statistics(anchors, contrasts, a, c, saved)


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """Gradients from those of the anchors' fields [W, S, N] and, with `both`, of the contrasts' fields [W, S, M]."""
    p = addressable(p)
    s, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.backward(p, saved, grad, grad_contrasts, needs)
    anchors = saved.anchors._replace(fields=grad.contiguous())
    contrasts = saved.contrasts._replace(fields=grad_contrasts.contiguous())
    swept, folded = two_sets_if_asymmetric(p)
    new = p.logit_scale.new_empty
    rows = new(p.anchors.values.shape) if needs.anchors else None
    columns = None
    if swept.contrasts is not None and (needs.anchors if folded else needs.contrasts):
        columns = new(swept.contrasts.values.shape)
    scale = new(s, dtype=torch.float64) if needs.logit_scale else None
    bias = new(m) if needs.bias and p.others.bias is not None else None
    own, other = _sides(p, anchors, contrasts, saved.saved)
    anchors_alone = rows is not None and columns is None and scale is None and bias is None
    weighted = _weighted_sums(p, saved.saved) if anchors_alone else (0, 0)
    outputs = (*weighted, p.positives is None and p.hard_negatives is None, *map(address, (rows, columns, scale, bias)))
    native.run(
        native.native_module().backward(
            native.engine()[0], describe(swept, same_rows=folded), (*own, 0), other and (*other, 0), outputs
        )
    )
    return _of_sources(rows, columns, scale, bias, folded)


def _of_sources(
    rows: Tensor | None, columns: Tensor | None, scale: Tensor | None, bias: Tensor | None, folded: bool
) -> Gradients:
    """folded: the anchors are both sets, and both gradients are theirs."""
    if folded and rows is not None and columns is not None:
        rows, columns = rows.add_(columns), None
    return Gradients(rows, columns, scale, bias)


def takes_mean_loss(p: Problem) -> bool:
    """Whether `mean_loss` covers the problem: one scale, no contrasts of one anchor alone, one direction of a guide."""
    alone = p.positives is None and p.hard_negatives is None
    return alone and not (p.guided and p.both) and len(p.logit_scale) == 1


def mean_loss(p: Problem, needs: Needs) -> tuple[Tensor, Gradients, Tensor | None]:
    """The mean of `direct.DirectMean`, its gradients, and the observed statistics."""
    p = addressable(p)
    loss, seen = _new_mean(p)
    return loss, _mean(p, None, loss, None, seen, needs), torch.cat(seen, -1) if seen else None


def keeps_products(p: Problem, needs: Needs) -> bool:
    """Whether `mean_loss` keeps the products for the gradients of all rows (csrc/cpu/contrastive/mean.cpp)."""
    if not needs.anchors or (p.contrasts is not None and not needs.contrasts) or p.anchors.groups is not None:
        return False
    _, n, m = p.sizes
    return n * m <= 2 * (n + m) * p.anchors.values.shape[-1]


def mean_forward(p: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mean, what `mean_backward` needs, and the observed statistics."""
    p = addressable(p)
    _, n, m = p.sizes
    loss, seen = _new_mean(p)
    kept = p.logit_scale.new_empty(_MEAN_KEPT * (n + m if p.both else n) + _weighted_size(p))
    _mean(p, kept, loss, None, seen, _NOTHING)
    return loss, kept, torch.cat(seen, -1) if seen else None


def mean_backward(p: Problem, kept: Tensor, grad: Tensor, needs: Needs) -> Gradients:
    """Gradients of the mean times `grad` []."""
    return _mean(addressable(p), kept, None, grad, (), needs)


def _new_mean(p: Problem) -> tuple[Tensor, list[Tensor]]:
    _, n, m = p.sizes
    seen = [_new_observed(p, size) for size in ((n, m) if p.both else (n,)) if p.observe]
    return p.logit_scale.new_empty(()), seen


def _mean(
    p: Problem, kept: Tensor | None, loss: Tensor | None, grad: Tensor | None, seen: Sequence[Tensor], needs: Needs
) -> Gradients:
    """One call of the engine: writes the loss if `loss` is given, and returns the needed gradients."""
    new = p.logit_scale.new_empty
    swept, folded = two_sets_if_asymmetric(p)
    rows = new(p.anchors.values.shape) if needs.anchors else None
    columns = None
    if swept.contrasts is not None and (needs.anchors if folded else needs.contrasts):
        columns = new(swept.contrasts.values.shape)
    scale = new(1, dtype=torch.float64) if needs.logit_scale else None
    bias = new(len(p.others.bias)) if needs.bias and p.others.bias is not None else None
    anchors_alone = rows is not None and columns is None and scale is None and bias is None
    weighted = 0, 0
    if kept is not None and (loss is not None or anchors_alone):
        weighted = _weighted_sums(p, kept, _MEAN_KEPT)
    observed = [*map(address, seen), 0, 0][:2]
    outputs = (
        *(p.want[0] == "lse_neg", address(kept), *weighted, address(loss), address(grad), *observed),
        *map(address, (rows, columns, scale, bias)),
    )
    described = describe(swept, same_rows=folded, differentiated=loss is not None and any(needs))
    native.run(native.native_module().mean(native.engine()[0], described, outputs))
    return _of_sources(rows, columns, scale, bias, folded)


def addressable(p: Problem) -> Problem:
    """A problem that the engine can address: rows with any strides, vectors contiguous, no lazy negation."""
    anchors, contrasts, scale = p.anchors, p.contrasts, p.logit_scale
    if _is_addressable(anchors) and (contrasts is None or _is_addressable(contrasts)) and _is_dense(scale):
        return p
    others = None if contrasts is None else _addressable_rows(contrasts)
    return replace(p, anchors=_addressable_rows(anchors), contrasts=others, logit_scale=_dense(scale))


def _is_addressable(rows: Rows) -> bool:
    values, clusters, ids, bias, assignments, *rules, _ = rows
    return (
        not values.is_neg()
        and (clusters is None or _is_dense(clusters))
        and (ids is None or _is_dense(ids))
        and (bias is None or _is_dense(bias))
        and (assignments is None or not assignments.is_neg())
        and all(values is None or _is_dense(values) for values in rules)
    )


def _addressable_rows(rows: Rows) -> Rows:
    values, clusters, ids, bias, assignments, *rules, normalize = rows
    return Rows(  # type: ignore[call-arg]
        values.resolve_neg(),
        None if clusters is None else _dense(clusters),
        None if ids is None else _dense(ids),
        None if bias is None else _dense(bias),
        None if assignments is None else assignments.resolve_neg(),
        *[None if values is None else _dense(values) for values in rules],  # type: ignore[arg-type]
        normalize,
    )


def _is_dense(values: Tensor) -> bool:
    return values.is_contiguous() and not values.is_neg()


def _dense(values: Tensor) -> Tensor:
    return values.resolve_neg().contiguous()


def two_sets_if_asymmetric(p: Problem) -> tuple[Problem, bool]:
    """A bias or a guide breaks the symmetry of self-contrast: the anchors then become the second set too.

    Returns the problem, and whether its two sets are the same rows.
    """
    if p.contrasts is not None or (p.anchors.bias is None and p.anchors.guide is None):
        return p, False
    return replace(p, anchors=p.anchors._replace(bias=None), contrasts=p.anchors), True


def _new_side(p: Problem, size: int) -> Side:
    side = new_side(p, size)
    return side._replace(observed=_new_observed(p, size)) if p.observe else side


def _new_observed(p: Problem, size: int) -> Tensor:
    return p.logit_scale.new_empty(len(PARTS), p.sizes[0], size)


def describe(
    p: Problem, depth: int | None = None, same_rows: bool = False, differentiated: bool = False
) -> tuple[int, ...]:
    """depth: numbers multiplied per pair; None: D. same_rows: two sets that are the same rows, without the diagonal.

    differentiated: the call also computes gradients of rows.
    """
    anchors, contrasts = p.anchors, p.contrasts
    n, d = anchors.values.shape
    m = n if contrasts is None else contrasts.values.shape[0]
    return (
        *describe_rows(anchors.values),
        *describe_rows(None if contrasts is None else contrasts.values),
        d,
        address(anchors.clusters),
        address(None if contrasts is None else contrasts.clusters),
        address(anchors.ids),
        address(None if contrasts is None else contrasts.ids),
        address(p.logit_scale),
        len(p.logit_scale),
        address(p.others.bias),
        anchors.normalize,
        contrasts is not None and contrasts.normalize,
        p.logit_scale.dtype == torch.float64,
        p.both,
        native.threads(n * m * (depth or d), native.PRODUCTS, differentiated),
        *(_rules(p, same_rows) if p.ruled or same_rows else (0,)),
    )


def _rules(p: Problem, same_rows: bool) -> tuple[int, ...]:
    own, other = p.anchors, p.contrasts or p.anchors
    guide, thresholds = own.guide, own.thresholds
    return (
        1,
        *map(address, (own.tags, other.tags)),
        0 if own.tags is None else own.tags.shape[1],
        *map(address, (own.samples, other.samples, own.groups, other.groups)),
        *describe_rows(guide),
        *describe_rows(other.guide),
        0 if guide is None else guide.shape[1],
        address(thresholds),
        same_rows,
    )


def _sides(p: Problem, anchors: Side, contrasts: Side, saved: Tensor) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Addresses of the statistics of both sides."""
    s, n, m = p.sizes
    own = _side(p.want, anchors, s, n, address(saved))
    if not p.both:
        return own, None
    return own, _side(p.want, contrasts, s, m, address(saved, 3 * s * n))


def _side(want: Sequence[str], side: Side, s: int, size: int, saved: int) -> tuple[int, ...]:
    counts, row = side.counts.data_ptr(), size * side.counts.element_size()
    block = s * row
    field, shift = side.fields.data_ptr(), side.parts.data_ptr()
    sums = shift + block * sum(name in LOG_SUMS for name in want)
    fields, shifts, totals = [0, 0, 0, 0], [0, 0, 0], [0, 0, 0]
    for name in want:  # in the order of SWEPT, in which log-sums come first
        k = _PLACES[name]
        fields[k] = field
        field += block
        if name in LOG_SUMS:
            shifts[k], totals[k] = shift, sums
            shift, sums = shift + block, sums + block
    rest = saved, saved + block, saved + 2 * block, address(side.observed)
    return *fields, *shifts, *totals, counts, counts + row, *rest


def _weighted_sums(p: Problem, saved: Tensor, numbers: int = 3) -> tuple[int, int]:
    """Addresses of the weighted sums and of their validity, behind `numbers` numbers per row."""
    if not _weighted(p):
        return 0, 0
    n, d = p.anchors.values.shape
    return address(saved, numbers * n), address(saved, numbers * n + n * d)
