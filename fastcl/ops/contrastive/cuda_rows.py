"""Rows as the CUDA kernels read them, and their description for ``csrc/bindings``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends.ids import places_of_ids
from ..backends.native import DTYPES, address
from ..backends.rows import tf32_allowed
from .fields import LOG_SUMS, SWEPT
from .kept import Layout, Store, logit_bounds, sums_are_kept
from .records import Problem

STEP = 32  # bytes: rows are padded to multiples of it


# What the forward saves.


def kept(p: Problem) -> Layout:
    """What the forward saves, by name: for each set the order of rows, each row's range in the other set, and names of
    sample ids; for each side the bases (to base 2) of the sums over all, negatives and positives; or, if
    `sums_are_kept`, the weighted sums in the order of rows."""
    s, n, m = p.sizes
    found: Layout = {"bases": (torch.float32, (3, s, n))}
    if p.both:
        found["contrast_bases"] = (torch.float32, (3, s, m))
    for prefix, size in (("", n), ("contrast_", m)):
        if prefix and p.contrasts is None:
            continue
        if p.anchors.clusters is not None:
            found[prefix + "order"] = (torch.int64, (size,))
            found[prefix + "range"] = (torch.int32, (2, size))
        if p.anchors.ids is not None:
            found[prefix + "names"] = (torch.int32, (size,))
    if sums_are_kept(p):
        found["weighted"] = (torch.float32, (n, padded(p)))
    return found


KEPT = Store(kept)


def product_dtype(p: Problem) -> torch.dtype:
    return torch.promote_types(p.anchors.values.dtype, p.others.values.dtype)


def padded(p: Problem) -> int:
    """The numbers of a row as it is stored for the kernels."""
    step = STEP // product_dtype(p).itemsize
    return -(-p.anchors.values.shape[1] // step) * step


# Clusters and ids.


def find_clusters(p: Problem, parts: dict[str, Tensor]) -> None:
    """Fills in the order of rows by cluster, and each row's range of positives in the other set.

    The number of a cluster is the place of its first anchor, so results do not depend on the names of clusters. An
    anchor without a cluster gets one of its own. Contrasts without an anchor in their cluster come last. Both ends of
    the ranges grow from row to row.
    """
    if p.anchors.clusters is None:
        return
    n = len(p.anchors.clusters)
    known, first = torch.sort(p.anchors.clusters, stable=True)
    labels = _found(p.anchors.clusters, known, first, torch.arange(n, device=p.device))
    own, order = torch.sort(labels, stable=True)
    parts["order"].copy_(order)
    other = own
    if p.contrasts is not None and p.contrasts.clusters is not None:
        other, order = torch.sort(_found(p.contrasts.clusters, known, first, n), stable=True)
        parts["contrast_order"].copy_(order)
        _ranges(other, own, parts["contrast_range"])
    _ranges(own, other, parts["range"])


def _ranges(rows: Tensor, others: Tensor, ranges: Tensor) -> None:
    torch.searchsorted(others, rows, out_int32=True, out=ranges[0])
    torch.searchsorted(others, rows, out_int32=True, right=True, out=ranges[1])


def find_names(p: Problem, parts: dict[str, Tensor]) -> None:
    """Fills in int32 names of sample ids: equal for equal ids, 0 for an id that no contrast has."""
    for name, places in zip(("names", "contrast_names"), places_of_ids(p.anchors.ids, p.others.ids), strict=True):
        if places is not None:
            torch.add(places, 1, out=parts[name])


def _found(ids: Tensor, known: Tensor, values: Tensor, otherwise: Tensor | int) -> Tensor:
    """For each id the value at its first place in `known` (ascending), or `otherwise`; -1 is never found."""
    ids = ids.contiguous()
    place = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
    return torch.where((known[place] == ids) & (ids != -1), values[place], otherwise)


# Rows.


@dataclass(frozen=True)
class Arranged:
    """The description of a problem's rows for the kernels. Keeps the memory alive that it points to."""

    numbers: tuple[int, ...]
    width: int
    folded: bool  # the rows meet themselves as a second set
    memory: list[Tensor | None] = field(repr=False)


_NO_ROWS = (0,) * 18


def arrange(p: Problem, parts: dict[str, Tensor], a: Tensor | None, c: Tensor | None) -> Arranged:
    """parts: `KEPT.parts`, filled in. a, c: where the inverse norms of rows [n], [m] go; None: nowhere."""
    dtype, d, width = product_dtype(p), p.anchors.values.shape[1], padded(p)
    folded = p.contrasts is None and p.anchors.bias is not None  # a bias breaks the symmetry of self-contrast
    normed = p.anchors.normalize or p.others.normalize
    memory: list[Tensor | None] = []

    def rows(
        source: Tensor,
        normalize: bool,
        prefix: str,
        names: Tensor | None,
        bias: Tensor | None,
        norms: Tensor | None,
        leave_out: bool = False,
    ) -> tuple[int, ...]:
        n = len(source)
        source = source.detach().resolve_neg()
        order, ranges = parts.get(prefix + "order"), parts.get(prefix + "range")
        as_it_is = order is None and width == d and source.dtype == dtype and source.is_contiguous()
        # A normalised row out of range is multiplied by a power of two, one that is left out becomes zeros.
        as_it_is = as_it_is and source.data_ptr() % 16 == 0 and not (leave_out or normalize)

        def new(there: bool, of: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(n, dtype=of, device=p.device) if there else None

        arranged = source if as_it_is else torch.empty(n, width, dtype=dtype, device=p.device)
        bias = None if bias is None else bias.detach().resolve_neg().contiguous()
        place = new(normed), new(names is not None, torch.int32), new(bias is not None)
        memory.extend((source, order, ranges, names, bias, arranged, *place))
        return (
            *(DTYPES[source.dtype], source.data_ptr(), n, *source.stride(), normalize, address(order)),
            *((0, 0) if ranges is None else (address(ranges[0]), address(ranges[1]))),
            *(address(names), address(bias), leave_out, address(arranged), as_it_is, address(norms)),
            *map(address, place),
        )

    names, others = parts.get("names"), parts.get("contrast_names")
    if folded:
        names = others = torch.arange(
            1, len(p.anchors.values) + 1, dtype=torch.int32, device=p.device
        )  # each but itself
    anchors = rows(p.anchors.values, p.anchors.normalize, "", names, None, a)
    if folded:
        contrasts = rows(p.anchors.values, p.anchors.normalize, "", others, p.anchors.bias, None)
    elif p.contrasts is None:
        contrasts = _NO_ROWS
    else:
        bias = p.contrasts.bias
        leave_out = (
            bias is not None
        )  # rows whose bias is -inf become zeros: as anchors of the other direction they are left out too
        contrasts = rows(p.contrasts.values, p.contrasts.normalize, "contrast_", others, bias, c, leave_out)
    scale = p.logit_scale.detach().resolve_neg().contiguous()
    longest, largest_bias = logit_bounds(p)
    memory.extend((scale, longest, largest_bias))
    scalars = (
        d,
        width,
        DTYPES[dtype],
        len(scale),
        address(scale),
        address(longest),
        address(largest_bias),
        dtype != torch.float32 or not tf32_allowed(),
    )
    return Arranged((*anchors, *contrasts, *scalars), width, folded, memory)


def wanted(want: Sequence[str]) -> tuple[int, ...]:
    """The place of each of SWEPT among those wanted, -1 for others, and the number of log-sum-exps."""
    return *(want.index(name) if name in want else -1 for name in SWEPT), len(LOG_SUMS.intersection(want))
