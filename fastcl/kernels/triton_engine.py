"""Backend ``triton``: the kernels of `triton_forward` and `triton_backward`, prepared and launched.

Triton itself is imported by the first call. Nothing here waits for the device: sizes come from shapes, everything that
depends on values (shifts, which kernel applies) is decided on the device, and scalars travel as tensors, so that a CUDA
graph can replay the calls with other ones.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module, metadata, util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import chunked
from .problem import (
    LARGEST_INVERSE,
    Gradients,
    Needs,
    Problem,
    Side,
    Statistics,
    empty_side,
    inverse_norms,
    over_sets,
)
from .triton_plan import Tile, finish_tile, padded, tile

FLOOR = (3, 2)  # torch 2.6 brings it
OLDEST_DEVICE = (8, 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
# Exponents that a sum may reach, and the bound on logits (to base 2) above which running maxima are taken at once.
HEADROOM, WIDE = 64.0, 150.0
ONE_EXPONENTIAL = 120.0  # log-sums (to base 2) that spread over no more share one exponential
PROGRAMS_INTERPRETED = 2


@cache
def availability() -> tuple[bool, str]:
    """Whether the backend is there, and how or why not."""
    if util.find_spec("triton") is None:
        return False, "Triton is not installed"
    version = metadata.version("triton")
    floor = ".".join(map(str, FLOOR))
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
        return False, f"Triton {version} is older than {floor}"
    if INTERPRETED:
        return True, f"Triton {version} (at least {floor}), interpreted on the CPU: TRITON_INTERPRET is set"
    if torch.version.cuda is None:
        return False, "this torch is built without CUDA, and TRITON_INTERPRET is not set"
    return True, f"Triton {version} (at least {floor})"


def refusal(device: torch.device) -> str:
    """Why rows on `device` are not for this backend; empty if they are."""
    if INTERPRETED:
        return "" if device.type == "cpu" else f"is interpreted and takes tensors on the CPU, got tensors on {device}"
    if device.type != "cuda":
        return f"takes tensors on a CUDA device, got tensors on {device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST_DEVICE:
        return "needs a device of compute capability 8.0 or newer, {} has {}.{}".format(
            device, *torch.cuda.get_device_capability(device)
        )
    return ""


def saved_size(p: Problem) -> int:
    """How many numbers the forward keeps for the backward.

    Of each row the bases, to base 2, of the sums over all, negatives and positives: [3, S, N], then [3, S, M]. For a
    backward of the anchors alone also the softmax-weighted sums of contrasts [N, D].
    """
    if p.dtype == torch.float64:
        return 0
    s, n, m = p.sizes
    return 3 * s * (n + m if p.both else n) + (n * p.anchors.shape[1] if _weighted(p) else 0)


def _weighted(p: Problem) -> bool:
    return p.anchors_only and p.contrasts is not None and p.contrast_bias is None and p.sizes[0] == 1 and not p.both


def forward(p: Problem) -> Statistics:
    s, n, m = p.sizes
    if p.dtype == torch.float64 or n == 0 or m == 0:
        return chunked.forward(p)._replace(saved=p.logit_scale.new_zeros(saved_size(p)))
    with _on(p.device):
        return _forward(p)


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """Gradients from those of the anchors' fields [W, S, N] and, with `both`, of the contrasts' fields [W, S, M]."""
    _, n, m = p.sizes
    if p.dtype == torch.float64 or n == 0 or m == 0:
        return chunked.backward(p, saved, grad, grad_contrasts, needs)
    with _on(p.device):
        return _backward(p, saved, grad, grad_contrasts, needs)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, and on that device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Rows as the kernels read them.


@dataclass(frozen=True)
class _Rows:
    """One set of rows, sorted by cluster."""

    rows: Tensor  # [n, padded D], contiguous
    order: Tensor | None  # [n] int64: the caller's place of each; None: the caller's order
    clusters: Tensor | None  # [n] by number of `_clusters`, in ascending order
    names: Tensor | None  # [n] int32, of sample ids: equal for equal ids, -1 for none
    inverse_norms: Tensor | None  # [n]
    bias: Tensor | None  # [n], times log2(e)

    def sorted(self, values: Tensor) -> Tensor:
        """[..., n] of the caller's order."""
        return values if self.order is None else values.index_select(-1, self.order)


@dataclass(frozen=True)
class _Arranged:
    anchors: _Rows
    contrasts: _Rows  # the anchors' very own in self-contrast
    self_contrast: bool
    normed: bool
    biased: bool
    scales: Tensor  # [S], times log2(e)
    precision: str

    def bounds(self, own: _Rows, other: _Rows) -> tuple[Tensor | None, Tensor | None]:
        """Of each of `own` rows the range of `other` rows in its cluster, [start, end) int32. Both grow."""
        if own.clusters is None or other.clusters is None:
            return None, None
        start, end = (
            torch.searchsorted(other.clusters, own.clusters, out_int32=True, right=right) for right in (False, True)
        )
        return start, end


def _arrange(p: Problem, known: Statistics | None = None) -> tuple[_Arranged, Tensor, Tensor]:
    """The problem's rows, and the inverse norms in the caller's order, [0] where rows are taken as they are."""

    def norms(rows: Tensor, normalize: bool, before: Tensor | None) -> Tensor:
        if not normalize:
            return p.logit_scale.new_empty(0)
        return inverse_norms(rows, p.dtype) if before is None else before

    a = norms(p.anchors, p.normalize_anchors, known and known.anchor_inverse_norms)
    biased = p.contrast_bias is not None
    self_contrast = p.contrasts is None and not biased
    if p.contrasts is None:
        c = p.logit_scale.new_empty(0)
        dtype = p.anchors.dtype
        contrasts, contrast_clusters, contrast_norms = p.anchors, p.anchor_clusters, a
        if biased:  # breaks the symmetry: the rows meet themselves as another set, each but itself
            own = torch.arange(p.anchors.shape[0], device=p.device)
            p = replace(p, anchor_ids=own, contrast_ids=own)
    else:
        c = norms(p.contrasts, p.normalize_contrasts, known and known.contrast_inverse_norms)
        dtype = torch.promote_types(p.anchors.dtype, p.contrasts.dtype)
        contrasts, contrast_clusters, contrast_norms = p.contrasts, p.contrast_clusters, c
    anchor_order, contrast_order = _clusters(p.anchor_clusters, None if self_contrast else contrast_clusters)
    anchor_names, contrast_names = _names(p.anchor_ids, p.contrast_ids)
    normed = p.normalize_anchors or (p.contrasts is not None and p.normalize_contrasts)
    bias = None if p.contrast_bias is None else p.contrast_bias * LOG2E
    anchors = _rows(p.anchors, dtype, anchor_order, anchor_names, a, normed, None)
    others = anchors
    if not self_contrast:
        others = _rows(contrasts, dtype, contrast_order, contrast_names, contrast_norms, normed, bias)
    arranged = _Arranged(anchors, others, self_contrast, normed, biased, p.logit_scale * LOG2E, _precision(dtype))
    return arranged, a, c


def _rows(
    rows: Tensor,
    dtype: torch.dtype,
    clusters_and_order: tuple[Tensor, Tensor] | None,
    names: Tensor | None,
    inverse: Tensor,
    normed: bool,
    bias: Tensor | None,
) -> _Rows:
    n, d = rows.shape
    width = padded(d, INTERPRETED)
    clusters, order = clusters_and_order or (None, None)
    rows = rows.detach().resolve_neg().to(dtype)
    if width != d:
        packed = rows.new_zeros(n, width)
        packed[:, :d] = rows if order is None else rows.index_select(0, order)
    else:
        packed = rows.contiguous() if order is None else rows.index_select(0, order)

    def arranged(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.resolve_neg().contiguous() if order is None else values.index_select(0, order)

    if normed and inverse.numel() == 0:
        inverse = torch.ones(n, dtype=torch.float32, device=rows.device)
    return _Rows(packed, order, clusters, arranged(names), arranged(inverse) if normed else None, arranged(bias))


def _clusters(
    anchors: Tensor | None, contrasts: Tensor | None
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """For either set the clusters' numbers, sorted, and the order of rows that sorts them. None without clusters.

    A cluster's number is the place of its first anchor, so that results do not depend on the names of clusters. An anchor
    without one is a cluster of its own. Contrasts that are nobody's positive come last.
    """
    if anchors is None:
        return None, None
    n = anchors.shape[0]
    ids, order = torch.sort(anchors, stable=True)
    start, end = (torch.searchsorted(ids, ids, right=right) for right in (False, True))
    alone = ids == -1
    number = torch.where(alone, order, order[start])
    size = torch.where(alone, 1, end - start)
    rank = torch.where(alone, 0, torch.arange(n, device=ids.device) - start)
    sizes = torch.zeros_like(number).scatter_(0, number, size)
    place = (sizes.cumsum(0) - sizes)[number] + rank
    sorted_anchors = (
        torch.empty_like(number).scatter_(0, place, number),
        torch.empty_like(order).scatter_(0, place, order),
    )
    if contrasts is None:
        return sorted_anchors, None
    place = torch.searchsorted(ids, contrasts.contiguous()).clamp_(max=n - 1)
    known = (ids[place] == contrasts) & (contrasts != -1)
    return sorted_anchors, tuple(torch.sort(torch.where(known, number[place], n), stable=True))


def _names(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """int32 names of ids: places among the right ones, found without asking the device how many there are."""
    if left is None or right is None:
        return None, None
    known = right.sort().values
    names = []
    for ids in (left, right):
        place = torch.searchsorted(known, ids.contiguous(), out_int32=True)
        there = known[place.clamp(max=len(known) - 1)] == ids
        names.append(torch.where(there & (ids != -1), place, -1))
    return names[0], names[1]


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32 rows, as torch's own follow `torch.set_float32_matmul_precision`."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


# Launches.


@cache
def _kernel(name: str) -> Any:
    module = "triton_backward" if name in ("gradient_kernel", "finish_kernel") else "triton_forward"
    return getattr(import_module(f"fastcl.kernels.{module}"), name)


@dataclass(frozen=True)
class _Launch:
    """What all kernels of a call are told alike."""

    rows: _Rows
    columns: _Rows
    start: Tensor | None
    end: Tensor | None
    flags: dict[str, Any]

    @classmethod
    def of(cls, arranged: _Arranged, rows: _Rows, columns: _Rows) -> _Launch:
        start, end = arranged.bounds(rows, columns)
        flags = {
            "CLUSTERS": start is not None,
            "IDS": rows.names is not None,
            "NORMED": arranged.normed,
            "BIAS": 0 if not arranged.biased else 1 if columns.bias is not None else 2,
            "PRECISION": arranged.precision,
            "INTERPRETED": INTERPRETED,
            "SELF": arranged.self_contrast,
        }
        return cls(rows, columns, start, end, flags)

    @property
    def size(self) -> int:
        return self.rows.rows.shape[0]

    def tile(self, kind: str) -> Tile:
        rows = self.rows.rows
        careful = self.flags["IDS"] or self.flags["BIAS"] != 0
        return tile(kind, _architecture(rows.device), rows.dtype, rows.shape[1], careful, INTERPRETED)

    def run(self, kernel: str, shape: Tile, grid: Sequence[int], arguments: dict[str, Any]) -> None:
        """`arguments` and those that each of these kernels takes, by name."""
        rows, columns = self.rows, self.columns
        given = {
            "X": rows.rows,
            "Y": columns.rows,
            "A": rows.inverse_norms,
            "C": columns.inverse_norms,
            "ROW_BIAS": rows.bias,
            "COLUMN_BIAS": columns.bias,
            "START": self.start,
            "END": self.end,
            "ROW_NAMES": rows.names,
            "COLUMN_NAMES": columns.names,
            "ORDER": rows.order,
            "N": rows.rows.shape[0],
            "M": columns.rows.shape[0],
            "D": rows.rows.shape[1],
            "BLOCK_M": shape.block_m,
            "BLOCK_N": shape.block_n,
            "BLOCK_K": shape.block_k,
            "BLOCK_D": shape.block_d,
            **self.flags,
            **arguments,
        }
        _launch(kernel, shape, grid, given)


def _launch(name: str, shape: Tile, grid: Sequence[int], given: dict[str, Any]) -> None:
    kernel = _kernel(name)
    arguments = {name: given[name] for name in kernel.arg_names}
    # Fused multiply-adds would round a logit in one place and not in another.
    with _interpreting():
        kernel[tuple(grid)](**arguments, num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=False)


@contextmanager
def _interpreting() -> Iterator[None]:
    """The interpreter replaces parts of Triton while it runs a kernel, so there can be one at a time. Its numpy would
    tell of overflows, which a device passes over in silence: masked places may hold anything."""
    if not INTERPRETED:
        yield
        return
    with _interpreter, np.errstate(all="ignore"):
        yield


_interpreter = threading.Lock()


@cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _programs(device: torch.device) -> int:
    """Of a kernel whose programs go on from row block to row block."""
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


# Forward.


def _forward(p: Problem) -> Statistics:
    arranged, a, c = _arrange(p)
    s, n, m = p.sizes
    shifts, wide = _shifts(p, arranged)
    apart = "lse_pos" in p.want or "lse_neg" in p.want
    rows = _Launch.of(arranged, arranged.anchors, arranged.contrasts)
    columns = _Launch.of(arranged, arranged.contrasts, arranged.anchors) if p.both else None
    new = p.logit_scale.new_empty
    statistics = new(s, 7, n)
    others = new(s, 7, m if p.both else 0)
    if _weighted(p):
        weighted = _weighted_forward(p, rows, arranged.scales, statistics[0])
        anchors, bases = _side(p, statistics, m)
        return Statistics(anchors, empty_side(p), a, c, torch.cat([bases.flatten(), weighted.flatten()]))
    for k in range(s):
        scalars = {"SCALE": arranged.scales[k : k + 1], "SHIFT": shifts[k : k + 1], "WIDE": wide[k : k + 1]}
        if columns is None:
            shape = rows.tile("forward")
            arguments = scalars | {"STATISTICS": statistics[k], "MIXED_ONLY": False}
            rows.run("statistics_kernel", shape, (_blocks(n, shape.block_m),), arguments)
        else:
            _two_ways(rows, columns, scalars, statistics[k], others[k])
        for launch, result in ((rows, statistics[k]), (columns, others[k])):
            if launch is not None:
                shape = launch.tile("running")
                arguments = scalars | {"STATISTICS": result, "APART": apart}
                launch.run("running_kernel", shape, (_blocks(launch.size, shape.block_m),), arguments)
    anchors, bases = _side(p, statistics, m)
    contrasts, other_bases = empty_side(p), new(0)
    if p.both:
        contrasts, other_bases = _side(p, others, n)
    return Statistics(anchors, contrasts, a, c, torch.cat([bases.flatten(), other_bases.flatten()]))


def _weighted_forward(p: Problem, rows: _Launch, scales: Tensor, statistics: Tensor) -> Tensor:
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
        (_blocks(n, shape.block_m), _blocks(rows.rows.rows.shape[1], shape.block_d)),
        {
            "SCALE": scales,
            "LIFT": (14 - largest.log2().ceil()).exp2(),
            "STATISTICS": statistics,
            "WEIGHTED": weighted,
            "WIDTH": d,
        },
    )
    return weighted


def _two_ways(rows: _Launch, columns: _Launch, scalars: dict[str, Any], statistics: Tensor, others: Tensor) -> None:
    """Both sides from one sweep. The few tiles that hold positives are visited once more for the columns."""
    shape = rows.tile("two_way")
    programs = min(_blocks(rows.size, shape.block_m), _programs(statistics.device))
    sums = statistics.new_zeros(programs, columns.size)
    rows.run("two_way_kernel", shape, (programs,), scalars | {"STATISTICS": statistics, "PARTIAL_SUMS": sums})
    shape = columns.tile("forward")
    arguments = scalars | {"STATISTICS": others, "MIXED_ONLY": True}
    columns.run("statistics_kernel", shape, (_blocks(columns.size, shape.block_m),), arguments)
    total = sums.sum(0)
    order = columns.rows.order
    if order is None:
        others[1].copy_(total)
    else:
        others[1].index_copy_(0, order, total)


def _shifts(p: Problem, arranged: _Arranged) -> tuple[Tensor, Tensor]:
    """[S] what to take off the logits (to base 2) of each scale, and int32 [S] whether that is too wide a range.

    No logit is larger than the bound. A bound that is not a number counts as wide.
    """

    def longest(rows: _Rows, normalized: bool) -> Tensor | float:
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


# Backward.


def _backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    arranged, _, _ = _arrange(p, saved)
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
        launch = _Launch.of(arranged, arranged.anchors, arranged.contrasts)
        sweeps.append(_Sweep(launch, own, other, needs.logit_scale, False))
    by_columns = (needs.contrasts and p.contrasts is not None) or (folded and needs.anchors)
    if by_columns or (needs.contrast_bias and arranged.biased):
        launch = _Launch.of(arranged, arranged.contrasts, arranged.anchors)
        sweeps.append(_Sweep(launch, other, own, False, needs.contrast_bias))
    weighted = None
    if _weighted(p) and not (needs.contrasts or needs.logit_scale):
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


def _lift(peak: Tensor, arranged: _Arranged) -> Tensor:
    """The power of two that brings the largest G near 2^12, norms included.

    G is rounded to the rows' dtype before it is multiplied with them, and float16 would flush a share of 1 / N^2 to zero.
    """
    for rows in (arranged.anchors, arranged.contrasts):
        if rows.inverse_norms is not None:
            peak = peak * rows.inverse_norms.amax().clamp(min=1.0)
    lift = torch.exp2((11 - peak.clamp(min=1e-30).log2()).floor().clamp(-100, 100))
    return torch.where(peak.isfinite(), lift, 1.0)


class _Side:
    """What one side's statistics and their gradients make of a logit: the kernels' [5, n], for one scale at a time."""

    def __init__(self, p: Problem, side: Side, bases: Tensor, grad: Tensor, rows: _Rows) -> None:
        both_base, base, positive_base = bases  # [S, n]
        shifts, sums = side.parts  # [L, S, n]
        weights = {}
        log_sums = []
        for k, name in enumerate(p.log_sums):
            weight = torch.where(sums[k] == 0, 0.0, grad[p.want.index(name)] / sums[k])
            # The sum may since have been joined by another term, and its base have been raised.
            before = {"lse_all": both_base, "lse_neg": base, "lse_pos": positive_base}[name] * LN2
            weights[name] = weight * (before - shifts[k]).exp()
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

    def __init__(self, launch: _Launch, own: _Side | None, other: _Side | None, scaled: bool, summed: bool) -> None:
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

    def run(self, arranged: _Arranged, k: int, lift: Tensor, weighted: Tensor | None) -> None:
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
        arguments = {
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
        grid = _blocks(launch.size, shape.block_m), _blocks(rows.shape[1], shape.block_d)
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
        done = torch.ones(_blocks(self.launch.size, block) * block, dtype=torch.int32, device=gradient.device)
        if start is not None and end is not None:
            done[: self.launch.size] = (start == end).to(torch.int32)
        return done.view(-1, block).amin(1)


def _finish(
    p: Problem, source: Tensor, rows: _Rows, gradient: Tensor, factor: Tensor | None, normalize: bool
) -> Tensor:
    """The gradient in the caller's order, projected off normalised rows; rounded once, where nothing is yet to be added."""
    n, width = rows.rows.shape
    out = torch.empty(source.shape, dtype=source.dtype if p.paired is None else p.dtype, device=source.device)
    shape = finish_tile(width, INTERPRETED)
    _launch(
        "finish_kernel",
        shape,
        (_blocks(n, shape.block_m),),
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
