"""Backend ``triton``: prepares and launches the kernels of the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import triton_launch
from ...backends.rows import LARGEST_INVERSE
from ...backends.triton_launch import INTERPRETED, blocks, on_device
from ...backends.triton_tiles import ROWS_AT_ONCE, row_tile
from .. import chunked
from ..records import Gradients, Needs, Problem, Side, Statistics
from .mean import MOST_ROWS
from .rows import KEPT, Arranged, Launch, SortedRows, arrange, fields_wanted


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """Gradients from those of the anchors' fields [W, S, N] and, with `both`, of the contrasts' fields [W, S, M]."""
    _, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.backward(p, saved, grad, grad_contrasts, needs)
    with on_device(p.device):
        return _backward(p, saved, grad, grad_contrasts, needs)


# Rows and columns share one exponential if their log-sums (to base 2) spread over at most this much. float32's range
# would allow 120, but an exponent of 60 is rounded to 2^-19, a relative error of 1e-6 where terms cancel.
ONE_EXPONENTIAL = 16.0


def _backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    parts = KEPT.parts(p, saved.saved)
    arranged, _, _ = arrange(p, parts, again=True)
    # The anchors are both sets, so both gradients are theirs.
    folded = p.contrasts is None and not arranged.self_contrast
    own = _Weights(p, saved.anchors, parts["bases"], grad, arranged.anchors)
    other = None
    if p.both:
        other = _Weights(p, saved.contrasts, parts["contrast_bases"], grad_contrasts, arranged.contrasts)
    lifts = _Lifts(p, own, other, arranged)
    own_side = lifts.side(own, other)
    other_side = own_side if arranged.self_contrast else None if other is None else lifts.side(other, own)

    sweeps = []
    if needs.anchors or needs.logit_scale:
        launch = Launch.of(arranged, arranged.anchors, arranged.contrasts)
        sweeps.append(_Sweep(launch, own_side, other_side, needs.logit_scale, False))
    by_columns = (needs.contrasts and p.contrasts is not None) or (folded and needs.anchors)
    if by_columns or (needs.bias and arranged.biased):
        launch = Launch.of(arranged, arranged.contrasts, arranged.anchors)
        sweeps.append(_Sweep(launch, other_side, own_side, False, needs.bias))
    weighted = None if needs.contrasts or needs.logit_scale else parts.get("weighted")
    for k in range(p.sizes[0]):
        for sweep in sweeps:
            sweep.run(p, k, lifts, weighted)

    rows = columns = scale = bias = None
    if needs.logit_scale:
        scale = _of_scale(sweeps[0].similarity_sums, lifts.lift, arranged.self_contrast)
    if needs.bias and arranged.biased:
        sums = (sweeps[-1].sums / lifts.lift[:, None]).sum(0)
        order = arranged.contrasts.order
        bias = sums if order is None else torch.empty_like(sums).index_copy_(0, order, sums)
    if needs.anchors:
        gradient = sweeps[0].gradient
        if folded:
            gradient = gradient + sweeps[1].gradient  # both in the order of the same clusters
        norms = saved.anchor_inverse_norms if p.anchors.normalize else None
        rows = finish(p, p.anchors.values, arranged.anchors, gradient, sweeps[0].factor, norms)
    if needs.contrasts and p.contrasts is not None:
        last = sweeps[-1]
        norms = saved.contrast_inverse_norms if p.contrasts.normalize else None
        columns = finish(p, p.contrasts.values, arranged.contrasts, last.gradient, last.factor, norms)
    return Gradients(rows, columns, scale, bias)


def _of_scale(similarity_sums: Tensor, lift: Tensor, half: bool) -> Tensor:
    """The gradient of the logit scales [S], from sums [S, n] that are `lift` [S] times too large."""
    s, n = similarity_sums.shape
    if s > 1 or n > MOST_ROWS:
        scale = similarity_sums.sum(1) / lift
        return scale / 2 if half else scale
    scale = torch.empty_like(lift)
    given = {"SIMILARITY_SUMS": similarity_sums, "LIFT": lift, "GRADIENT": scale, "N": n, "HALF": half}
    triton_launch.launch("scale_kernel", ROWS_AT_ONCE, (1,), given | {"BLOCK": ROWS_AT_ONCE.block_m})
    return scale


class _Weights:
    """Weights of one side's exponentials, from its statistics and their gradients, in the order of its rows."""

    def __init__(self, p: Problem, side: Side, bases: Tensor, grad: Tensor, rows: SortedRows) -> None:
        _, s, n = bases.shape
        self.count = blocks(n, ROWS_AT_ONCE.block_m)
        self.values = bases.new_empty(s, 7, n)
        self.extremes = bases.new_empty(4, s, self.count)
        triton_launch.launch(
            "weights_kernel",
            ROWS_AT_ONCE,
            (self.count, s),
            {
                "GRAD": grad.contiguous(),
                "COUNTS": side.counts,
                "PARTS": side.parts,
                "BASES": bases,
                "ORDER": rows.order,
                "WEIGHTS": self.values,
                "EXTREMES": self.extremes,
                "N": n,
                "BLOCK": ROWS_AT_ONCE.block_m,
                **fields_wanted(p),
            },
        )


class _Lifts:
    """Bases and factors of each scale, [S], that depend on both sides; `side` fills them in."""

    def __init__(self, p: Problem, own: _Weights, other: _Weights | None, arranged: Arranged) -> None:
        s = p.logit_scale.shape[0]
        self._scale = p.logit_scale
        # Whether one exponential may serve two sides. The kernel with rules always computes two.
        self.two_sides = (arranged.self_contrast or other is not None) and arranged.rule_flags is None
        self.one = torch.empty(s, dtype=torch.int32, device=p.device)  # 1 where one exponential serves both sides
        self.middle, self.lift, self.factor = (torch.empty_like(self._scale) for _ in range(3))

    def side(self, own: _Weights, other: _Weights | None) -> Tensor:
        """[S, 5, n] as `gradient_kernel` takes it."""
        s, _, n = own.values.shape
        result = own.values.new_empty(s, 5, n)
        triton_launch.launch(
            "side_kernel",
            ROWS_AT_ONCE,
            (own.count, s),
            {
                "WEIGHTS": own.values,
                "EXTREMES": own.extremes,
                "OTHER_EXTREMES": (own if other is None else other).extremes,
                "SCALE": self._scale,
                "SIDE": result,
                "ONE": self.one,
                "MIDDLE": self.middle,
                "LIFT": self.lift,
                "FACTOR": self.factor,
                "N": n,
                "COUNT": own.count,
                "OTHER_COUNT": 0 if other is None else other.count,
                "TWO_SIDES": int(self.two_sides),
                "CLOSE": ONE_EXPONENTIAL,
                "BLOCK": ROWS_AT_ONCE.block_m,
            },
        )
        return result


class _Sweep:
    """The gradients of one set of rows, summed over the scales."""

    def __init__(self, launch: Launch, own: Tensor | None, other: Tensor | None, scaled: bool, summed: bool) -> None:
        self.launch, self.own, self.other = launch, own, other
        self.scaled, self.summed = scaled, summed
        self._gradients: Tensor | None = None
        self._similarity_sums: list[Tensor] = []
        self._sums: list[Tensor] = []
        self.factor: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """[n, padded D] float32, in the sorted order, to be multiplied by `factor`."""
        assert self._gradients is not None
        return self._gradients

    @property
    def similarity_sums(self) -> Tensor:
        """[S, n]"""
        sums = self._similarity_sums
        return sums[0][None] if len(sums) == 1 else torch.stack(sums)

    @property
    def sums(self) -> Tensor:
        """[S, n]"""
        return torch.stack(self._sums)

    def run(self, p: Problem, k: int, lifts: _Lifts, weighted: Tensor | None) -> None:
        """weighted: the gradient sums that the forward saved, for rows without a positive."""
        launch, rows = self.launch, self.launch.rows.rows
        new = lifts.lift.new_empty
        kind, kernel = ("ruled_backward", "ruled_gradient_kernel") if launch.ruled else ("backward", "gradient_kernel")
        count = 1 if weighted is not None else launch.column_parts(kind)
        parts = (count,) if count > 1 else ()
        gradient, factor = new((*parts, *rows.shape)), lifts.factor[k : k + 1]
        if weighted is not None and self.own is not None:
            d = weighted.shape[1]
            if d < rows.shape[1]:
                gradient[:, d:].zero_()
            torch.mul(weighted, self.own[k, 1, :, None], out=gradient[:, :d])
            if not launch.flags["CLUSTERS"]:
                self._gradients, self.factor = gradient, factor
                return
        similarity_sums = new((*parts, launch.size)) if self.scaled else None
        sums = new((*parts, launch.size)) if self.summed else None
        arguments: dict[str, Any] = {
            "SCALE": p.logit_scale[k : k + 1],
            "SIDE": None if self.own is None else self.own[k],
            "OTHER": None if self.other is None else self.other[k],
            "MIDDLE": lifts.middle[k : k + 1],
            "ONE": lifts.one[k : k + 1],
            "GRADIENT": gradient,
            "SIMILARITY_SUMS": similarity_sums,
            "SUMS": sums,
            "OWN": self.own is not None,
            "OTHERS": self.other is not None,
            "SOME": weighted is not None,
            "SPLIT": count > 1,
        }
        both = [arguments | {"ONE_EXPONENTIAL": one} for one in ((1, 0) if lifts.two_sides else (0,))]
        launch.sweep(kind, kernel, lambda shape: (*launch.grid(shape), count), *both)
        if parts:
            gradient = gradient.sum(0)
            similarity_sums = None if similarity_sums is None else similarity_sums.sum(0)
            sums = None if sums is None else sums.sum(0)
        if p.logit_scale.shape[0] == 1:
            self._gradients, self.factor = gradient, factor
        elif self._gradients is None:
            self._gradients, self.factor = gradient.mul_(factor), torch.ones_like(factor)
        else:
            self._gradients.addcmul_(gradient, factor)
        if similarity_sums is not None:
            self._similarity_sums.append(similarity_sums)
        if sums is not None:
            self._sums.append(sums)


def finish(
    p: Problem, source: Tensor, rows: SortedRows, gradient: Tensor, factor: Tensor | None, norms: Tensor | None
) -> Tensor:
    """The gradient in the caller's order, through the normalisation; rounded unless more is added to it."""
    n, width = rows.rows.shape
    out = torch.empty(source.shape, dtype=p.dtype if p.unrounded else source.dtype, device=source.device)
    shape = row_tile(width, INTERPRETED)
    triton_launch.launch(
        "finish_kernel",
        shape,
        (blocks(n, shape.block_m),),
        {
            "GRADIENT": gradient,
            "X": rows.rows,
            "NORMS": rows.rows if norms is None else norms,
            "NORMALIZED": int(norms is not None),
            "ORDER": rows.order,
            "FACTOR": factor,
            "OUT": out,
            "N": n,
            "WIDTH": source.shape[1],
            "LARGEST_INVERSE": LARGEST_INVERSE[p.dtype],
            "D": width,
            "BLOCK_M": shape.block_m,
            "BLOCK_D": shape.block_d,
            "INTERPRETED": INTERPRETED,
        },
    )
    return out
