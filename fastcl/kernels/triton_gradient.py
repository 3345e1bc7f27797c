"""The backward of backend ``triton``: sweeps for the gradients of either set of rows, and what goes into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import triton_launch
from .problem import LARGEST_INVERSE, Gradients, Needs, Problem, Side, Statistics, over_sets
from .triton_launch import INTERPRETED, blocks
from .triton_plan import finish_tile
from .triton_rows import LN2, LOG2E, Arranged, Launch, Rows, arrange, sums_are_kept

# Log-sums (to base 2) that spread over no more share one exponential. Range would allow 120, but an exponent of 60 has
# been rounded to 2^-19: a relative error of 1e-6 where terms cancel.
ONE_EXPONENTIAL = 16.0


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    arranged, _, _ = arrange(p, saved)
    s, n, m = p.sizes
    folded = p.contrasts is None and arranged.biased  # two sets that are one: both gradients are the anchors'
    grad = over_sets(p, grad, saved.anchors.counts)
    peak = grad.abs().sum(0).amax()
    own = _Side(p, saved.anchors, saved.saved[: 3 * s * n].view(3, s, n), grad, arranged.anchors)
    other = own if arranged.self_contrast else None
    if p.both:
        grad_contrasts = over_sets(p, grad_contrasts, saved.contrasts.counts)
        peak = peak + grad_contrasts.abs().sum(0).amax()
        bases = saved.saved[3 * s * n :].view(3, s, m)
        other = _Side(p, saved.contrasts, bases, grad_contrasts, arranged.contrasts)
    lift = _lift(peak, arranged)

    sweeps = []
    if needs.anchors or needs.logit_scale:
        launch = Launch.of(arranged, arranged.anchors, arranged.contrasts)
        sweeps.append(_Sweep(launch, own, other, needs.logit_scale, False))
    by_columns = (needs.contrasts and p.contrasts is not None) or (folded and needs.anchors)
    if by_columns or (needs.contrast_bias and arranged.biased):
        launch = Launch.of(arranged, arranged.contrasts, arranged.anchors)
        sweeps.append(_Sweep(launch, other, own, False, needs.contrast_bias))
    weighted = None
    if sums_are_kept(p) and not (needs.contrasts or needs.logit_scale):
        weighted = saved.saved[3 * n :].view(p.anchors.shape)
    for k in range(s):
        for sweep in sweeps:
            sweep.run(arranged, k, lift, weighted)

    rows = columns = scale = bias = None
    if needs.logit_scale:
        scale = sweeps[0].similarity_sums.sum(1) * ((0.5 if arranged.self_contrast else 1.0) / lift)
    if needs.contrast_bias and arranged.biased:
        sums = sweeps[-1].sums.sum(0) / lift
        order = arranged.contrasts.order
        bias = sums if order is None else torch.empty_like(sums).index_copy_(0, order, sums)
    if needs.anchors:
        gradient = sweeps[0].gradient
        if folded:
            gradient = gradient + sweeps[1].gradient  # both in the order of the same clusters
        rows = _finish(p, p.anchors, arranged.anchors, gradient, sweeps[0].factor, p.normalize_anchors)
    if needs.contrasts and p.contrasts is not None:
        last = sweeps[-1]
        columns = _finish(p, p.contrasts, arranged.contrasts, last.gradient, last.factor, p.normalize_contrasts)
    return Gradients(rows, columns, scale, bias)


def _lift(peak: Tensor, arranged: Arranged) -> Tensor:
    """The power of two that brings the largest G near 2^11, norms included.

    G is rounded to the rows' dtype before it is multiplied with them, and float16 would flush a share of 1 / N^2.
    """
    norms = [
        rows.inverse_norms.amax() for rows in (arranged.anchors, arranged.contrasts) if rows.inverse_norms is not None
    ]
    if norms:  # G is rounded with those of one side, the columns'
        peak = peak * torch.stack(norms).amax().clamp(min=1.0)
    lift = torch.exp2((11 - peak.clamp(min=1e-30).log2()).floor().clamp(-100, 100))
    return torch.where(peak.isfinite(), lift, 1.0)


class _Side:
    """What one side's statistics and their gradients make of a logit: the kernels' [5, n], for one scale at a time."""

    def __init__(self, p: Problem, side: Side, bases: Tensor, grad: Tensor, rows: Rows) -> None:
        both_base, base, positive_base = bases  # [S, n]
        shifts, sums = side.parts  # [L, S, n]
        weights = {}
        log_sums = []
        for k, name in enumerate(p.log_sums):
            weight = torch.where(sums[k] == 0, 0.0, grad[p.want.index(name)] / sums[k])
            # The sum may since have been joined by another term, and its base have been raised.
            before = {"lse_all": both_base, "lse_neg": base, "lse_pos": positive_base}[name] * LN2
            # That of an empty sum may have fallen: there is nothing to weight then, and nothing to overflow.
            weights[name] = weight * (before - shifts[k]).clamp(max=0).exp()
            log_sums.append(torch.where(sums[k] == 0, torch.nan, shifts[k] * LOG2E + sums[k].log2()))
        none = torch.zeros_like(base)
        everything, negative, positive = (weights.get(name, none) for name in ("lse_all", "lse_neg", "lse_pos"))
        extra = grad[p.want.index("sum_pos")] if "sum_pos" in p.want else none
        values = torch.stack([both_base, base, positive_base, everything, negative, positive, extra])
        self.values = rows.sorted(values)  # [7, S, n]
        self.log_sums = torch.stack(log_sums) if log_sums else none.new_empty(0, *none.shape)  # NaN: of an empty set

    def lifted(self, k: int, lift: Tensor, middle: Tensor | None) -> Tensor:
        """[5, n]; with `middle` the weights are those of one base for all."""
        both_base, base, positive_base, everything, negative, positive, extra = self.values[:, k]
        if middle is None:
            negative = everything * (base - both_base).clamp(max=0).exp2() + negative
            positive = everything * (positive_base - both_base).clamp(max=0).exp2() + positive
        else:
            everything = _shifted(everything, middle - both_base)
            negative = everything + _shifted(negative, middle - base)
            positive = everything + _shifted(positive, middle - positive_base)
        return torch.stack([base, negative * lift, positive_base, positive * lift, extra * lift])


def _shifted(weight: Tensor, exponent: Tensor) -> Tensor:
    """weight * 2^exponent, by halves: the result may be in float32's range where the power is not."""
    half = (exponent / 2).exp2()
    return torch.where(weight == 0, weight, weight * half * half)


def _middle(own: _Side, other: _Side, k: int) -> tuple[Tensor, Tensor]:
    """The middle of all log-sums (to base 2), and int32 whether they lie close enough around it for one exponential.

    No logit exceeds the log-sum of a set that it is in, so none overflows, and what is flushed is below 2^-60 of a sum.
    """
    log_sums = torch.cat([own.log_sums[:, k].flatten(), other.log_sums[:, k].flatten()])
    if log_sums.numel() == 0:
        return log_sums.new_zeros(1), log_sums.new_ones(1, dtype=torch.int32)
    low = log_sums.nan_to_num(nan=torch.inf).amin()
    high = log_sums.nan_to_num(nan=-torch.inf).amax()
    close = high - low < ONE_EXPONENTIAL
    middle = torch.where(close & (high >= low), (high + low) / 2, 0.0)
    return middle.reshape(1), close.to(torch.int32).reshape(1)


class _Sweep:
    """The gradients that one set of rows owns, summed over the scales."""

    def __init__(self, launch: Launch, own: _Side | None, other: _Side | None, scaled: bool, summed: bool) -> None:
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
        return torch.stack(self._similarity_sums)

    @property
    def sums(self) -> Tensor:
        """[S, n]"""
        return torch.stack(self._sums)

    def run(self, arranged: Arranged, k: int, lift: Tensor, weighted: Tensor | None) -> None:
        """`weighted`: what the forward has left of it, for rows without a positive."""
        launch, rows = self.launch, self.launch.rows.rows
        shape = launch.tile("backward")
        new = lift.new_empty
        gradient = new(rows.shape)
        done = None
        if weighted is not None and self.own is not None:
            done = self._from_weighted(weighted, k, lift, gradient, shape.block_m)
            if launch.start is None:
                self._gradients, self.factor = gradient, (arranged.scales / LOG2E) / lift
                return
        similarity_sums = new(launch.size) if self.scaled else None
        sums = new(launch.size) if self.summed else None
        one = torch.zeros(1, dtype=torch.int32, device=rows.device)
        middle = None
        if self.own is not None and self.other is not None:
            middle, one = _middle(self.own, self.other, k)
        arguments: dict[str, Any] = {
            "SCALE": arranged.scales[k : k + 1],
            "MIDDLE": middle,
            "ONE": one,
            "DONE": done,
            "GRADIENT": gradient,
            "SIMILARITY_SUMS": similarity_sums,
            "SUMS": sums,
            "OWN": self.own is not None,
            "OTHERS": self.other is not None,
        }
        grid = blocks(launch.size, shape.block_m), blocks(rows.shape[1], shape.block_d)
        for one_exponential in (0,) if middle is None else (1, 0):
            base = middle if one_exponential else None
            arguments |= {
                "SIDE": None if self.own is None else self.own.lifted(k, lift, base),
                "OTHER": None if self.other is None else self.other.lifted(k, lift, base),
                "ONE_EXPONENTIAL": one_exponential,
            }
            launch.run("gradient_kernel", shape, grid, arguments)
        factor = (arranged.scales[k : k + 1] / LOG2E) / lift
        if arranged.scales.shape[0] == 1:
            self._gradients, self.factor = gradient, factor
        elif self._gradients is None:
            self._gradients, self.factor = gradient.mul_(factor), torch.ones_like(factor)
        else:
            self._gradients.addcmul_(gradient, factor)
        if similarity_sums is not None:
            self._similarity_sums.append(similarity_sums)
        if sums is not None:
            self._sums.append(sums)

    def _from_weighted(self, weighted: Tensor, k: int, lift: Tensor, gradient: Tensor, block: int) -> Tensor:
        """Fills in the gradient of all rows as if none had positives; int32 for each row block: whether that is so."""
        assert self.own is not None
        d = weighted.shape[1]
        gradient[:, d:].zero_()
        torch.mul(weighted, self.own.lifted(k, lift, None)[1][:, None], out=gradient[:, :d])
        start, end = self.launch.start, self.launch.end
        done = torch.ones(blocks(self.launch.size, block) * block, dtype=torch.int32, device=gradient.device)
        if start is not None and end is not None:
            done[: self.launch.size] = (start == end).to(torch.int32)
        return done.view(-1, block).amin(1)


def _finish(p: Problem, source: Tensor, rows: Rows, gradient: Tensor, factor: Tensor | None, normalize: bool) -> Tensor:
    """The gradient in the caller's order, projected off normalised rows; rounded, where nothing is to be added yet."""
    n, width = rows.rows.shape
    out = torch.empty(source.shape, dtype=source.dtype if p.paired is None else p.dtype, device=source.device)
    shape = finish_tile(width, INTERPRETED)
    triton_launch.launch(
        "finish_kernel",
        shape,
        (blocks(n, shape.block_m),),
        {
            "GRADIENT": gradient,
            "X": rows.rows,
            "INVERSE_NORMS": rows.inverse_norms if normalize else None,
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
