"""Rows as the Triton kernels read them: sorted by cluster, padded, with what belongs to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import triton_launch
from .problem import Problem, Statistics, inverse_norms
from .triton_launch import INTERPRETED, architecture
from .triton_plan import Tile, padded, tile

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453


@dataclass(frozen=True)
class Rows:
    """One set of rows, sorted by cluster."""

    rows: Tensor  # [n, padded D], contiguous
    order: Tensor | None  # [n] int64: the caller's place of each; None: the caller's order
    clusters: Tensor | None  # [n] by number of `clusters_in_order`, in ascending order
    names: Tensor | None  # [n] int32, of sample ids: equal for equal ids, -1 for none
    inverse_norms: Tensor | None  # [n]
    bias: Tensor | None  # [n], times log2(e)

    def sorted(self, values: Tensor) -> Tensor:
        """[..., n] of the caller's order."""
        return values if self.order is None else values.index_select(-1, self.order)


@dataclass(frozen=True)
class Arranged:
    anchors: Rows
    contrasts: Rows  # the anchors' very own in self-contrast
    self_contrast: bool
    normed: bool
    biased: bool
    scales: Tensor  # [S], times log2(e)
    precision: str

    def bounds(self, own: Rows, other: Rows) -> tuple[Tensor | None, Tensor | None]:
        """Of each of `own` rows the range of `other` rows in its cluster, [start, end) int32. Both grow."""
        if own.clusters is None or other.clusters is None:
            return None, None
        start, end = (
            torch.searchsorted(other.clusters, own.clusters, out_int32=True, right=right) for right in (False, True)
        )
        return start, end


def arrange(p: Problem, known: Statistics | None = None) -> tuple[Arranged, Tensor, Tensor]:
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
    anchor_order, contrast_order = clusters_in_order(
        p.anchor_clusters, None if p.contrasts is None else contrast_clusters
    )
    if p.contrasts is None:
        contrast_order = anchor_order
    anchor_names, contrast_names = names_of(p.anchor_ids, p.contrast_ids)
    normed = p.normalize_anchors or (p.contrasts is not None and p.normalize_contrasts)
    bias = None if p.contrast_bias is None else p.contrast_bias * LOG2E
    anchors = _rows(p.anchors, dtype, anchor_order, anchor_names, a, normed, None)
    others = anchors
    if not self_contrast:
        others = _rows(contrasts, dtype, contrast_order, contrast_names, contrast_norms, normed, bias)
    arranged = Arranged(anchors, others, self_contrast, normed, biased, p.logit_scale * LOG2E, _precision(dtype))
    return arranged, a, c


def _rows(
    rows: Tensor,
    dtype: torch.dtype,
    clusters_and_order: tuple[Tensor, Tensor] | None,
    names: Tensor | None,
    inverse: Tensor,
    normed: bool,
    bias: Tensor | None,
) -> Rows:
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
    return Rows(packed, order, clusters, arranged(names), arranged(inverse) if normed else None, arranged(bias))


def clusters_in_order(
    anchors: Tensor | None, contrasts: Tensor | None
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """For either set the clusters' numbers, sorted, and the order of rows that sorts them. None without clusters.

    A cluster's number is the place of its first anchor, so that results do not depend on the names of clusters. An
    anchor without one is a cluster of its own. Contrasts that are nobody's positive come last.
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
    sorted_contrasts = torch.sort(torch.where(known, number[place], n), stable=True)
    return sorted_anchors, (sorted_contrasts.values, sorted_contrasts.indices)


def names_of(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
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
    """Of products of float32 rows, as torch's own follow `torch.set_float32_matmul_precision`.

    Newer versions of torch keep it by device, and the old question raises where the new setting was used.
    """
    if dtype != torch.float32:
        return "ieee"
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"
    return "tf32" if tf32 else "ieee"


@dataclass(frozen=True)
class Launch:
    """What all kernels of a call are told alike."""

    rows: Rows
    columns: Rows
    start: Tensor | None
    end: Tensor | None
    flags: dict[str, Any]

    @classmethod
    def of(cls, arranged: Arranged, rows: Rows, columns: Rows) -> Launch:
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
        return tile(kind, architecture(rows.device), rows.dtype, rows.shape[1], careful, INTERPRETED)

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
        triton_launch.launch(kernel, shape, grid, given)


def sums_are_kept(p: Problem) -> bool:
    """Whether the forward leaves the anchors' weighted sums of contrasts, of which their gradient is made."""
    return p.anchors_only and p.contrasts is not None and p.contrast_bias is None and p.sizes[0] == 1 and not p.both
