"""Rows as the Triton kernels read them: sorted by cluster and padded, with ranges, ids and biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...backends import triton_launch, triton_tuning
from ...backends.ids import places_of_ids
from ...backends.rows import NORM_FLOOR
from ...backends.triton_launch import (
    INTERPRETED,
    architecture,
    blocks,
    device_name,
    fast_precision_of,
    precision_of,
    programs,
)
from ...backends.triton_tiles import (
    COMPARED,
    ROWS_AT_ONCE,
    Tile,
    arranging_tile,
    for_variant,
    guide_width,
    padded,
    tile,
)
from ..kept import Layout, Store, sums_are_kept
from ..records import Problem, Rows

PROGRAMS_AT_ONCE = 2  # on a multiprocessor
FEWEST_TILES = 64  # of a program; fewer would not pay for joining the parts

# Up to this many rows are sorted by comparing each with all.
MOST_COMPARED = 1 << 13

# Data of rows that the kernels with rules compare, as int32 names, and their arguments ROW_* and COLUMN_*.
NAMED = ("clusters", "ids", "samples")
RULES = ("CLUSTERS", "IDS", "SAMPLES", "TAGS", "GUIDE", "GUIDE_NORMS", "THRESHOLDS")


def has_rules(p: Problem) -> bool:
    """Whether the kernels with rules compute the problem. Those of soft assignments know ids in self-contrast."""
    return p.ruled and p.anchors.assignments is None


def sorted_by(p: Problem, rows: Rows) -> Tensor | None:
    """The numbers [n] that rows are sorted by: clusters, or, with rules, groups."""
    return rows.groups if has_rules(p) else rows.clusters


# What the forward saves.


def kept(p: Problem) -> Layout:
    """What the forward saves, by name: the order of rows, their clusters and names, and for each side the bases (to
    base 2) of the sums over all, negatives and positives; or, if `sums_are_kept`, the weighted sums in that order.

    With rules, groups take the place of clusters, and each of `NAMED` has its own names."""
    s, n, m = p.sizes
    found: Layout = {}
    if sorted_by(p, p.anchors) is not None:
        found |= {"order": (torch.int64, (n,)), "clusters": (torch.int32, (n,))}
        if p.contrasts is not None:
            found |= {"contrast_order": (torch.int64, (m,)), "contrast_clusters": (torch.int32, (m,))}
    if has_rules(p):
        found |= {f"{name} of anchors": (torch.int32, (n,)) for name in _named(p)}
        if p.contrasts is not None:
            found |= {f"{name} of contrasts": (torch.int32, (m,)) for name in _named(p)}
    elif p.anchors.ids is not None:
        found |= {"names": (torch.int32, (n,)), "contrast_names": (torch.int32, (m,))}
    found["bases"] = (torch.float32, (3, s, n))
    if p.both:
        found["contrast_bases"] = (torch.float32, (3, s, m))
    if sums_are_kept(p):
        found["weighted"] = (torch.float32, (n, p.anchors.values.shape[1]))
    return found


def _named(p: Problem) -> list[str]:
    """Those of `NAMED` that the rows have."""
    return [name for name in NAMED if getattr(p.anchors, name) is not None and getattr(p.others, name) is not None]


KEPT = Store(kept)

# Rows.


@dataclass(frozen=True)
class SortedRows:
    """One set of rows, sorted by cluster, or by group if there are rules. Ranges are then of groups."""

    rows: Tensor  # [n, padded D], contiguous
    order: Tensor | None  # [n] int64: the caller's place of each; None: the caller's order
    inverse_norms: Tensor | None  # [n], of the rows as they are here
    start: Tensor | None  # [n] int32: the other set's rows of the row's cluster, [start, end). Both grow.
    end: Tensor | None
    names: Tensor | None  # [n] int32, of sample ids: equal for equal ids, 0 for none
    bias: Tensor | None  # [n], times log2(e)
    lengths: Tensor | None = None  # [n], in a forward: norms of rows that are not normalised
    rules: dict[str, Tensor | None] = field(default_factory=dict)  # the arguments of the kernels with rules, by name


@dataclass(frozen=True)
class Arranged:
    anchors: SortedRows
    contrasts: SortedRows  # in self-contrast the anchors
    self_contrast: bool  # one set of rows, and what i is for j, j is for i: bias and guide make them two sets
    normed: bool
    biased: bool
    precision: str
    rule_flags: dict[str, Any] | None  # further arguments of the kernels with rules; None without rules


def arrange(p: Problem, parts: dict[str, Tensor], again: bool = False) -> tuple[Arranged, Tensor, Tensor]:
    """The problem's rows, and the inverse norms in the caller's order, [0] without normalisation.

    parts: `KEPT.parts`, which are filled in. again: the backward, where they are filled in.
    """
    if not again:
        number_clusters(sorted_by(p, p.anchors), None if p.contrasts is None else sorted_by(p, p.contrasts), parts)
        if has_rules(p):
            name_rules(p, parts)
        else:
            name_ids(p.anchors.ids, p.others.ids, parts)
    dtype = torch.promote_types(p.anchors.values.dtype, p.others.values.dtype)
    ruled = has_rules(p)
    self_contrast = p.contrasts is None and p.anchors.bias is None and not p.guided
    normed = p.anchors.normalize or p.others.normalize

    def inverse_norms(rows: Tensor, normalize: bool) -> Tensor:
        # The backward drops them, but so one compiled kernel serves both.
        return rows.new_empty(len(rows) if normalize else 0, dtype=torch.float32)

    a, c = inverse_norms(p.anchors.values, p.anchors.normalize), inverse_norms(p.anchors.values, False)
    other = "clusters" if p.contrasts is None else "contrast_clusters"
    order, names = parts.get("order"), parts.get("names")
    if p.contrasts is None and not (self_contrast or ruled):
        # A bias breaks the symmetry: the anchors become the second set too, and each leaves out itself.
        names = torch.arange(1, len(p.anchors.values) + 1, dtype=torch.int32, device=p.device)
    clusters = parts.get("clusters"), parts.get(other)
    bias = p.anchors.bias if p.contrasts is None else None
    anchors = _rows(
        p.anchors.values, dtype, order, clusters, names, bias, False, p.anchors.normalize, normed, a, not again
    )
    others = anchors
    if p.contrasts is not None:
        c = inverse_norms(p.contrasts.values, p.contrasts.normalize)
        others = _rows(
            p.contrasts.values,
            dtype,
            parts.get("contrast_order"),
            clusters[::-1],
            parts.get("contrast_names"),
            p.contrasts.bias,
            p.contrasts.bias is not None,
            p.contrasts.normalize,
            normed,
            c,
            not again,
        )
    elif not self_contrast:
        anchors = replace(anchors, bias=None)
    rule_flags = None
    if ruled:
        anchors, others, rule_flags = with_rules(p, parts, anchors, others)
    biased = p.others.bias is not None
    # The tiles of soft assignments are those for products in float32.
    hard = p.anchors.assignments is None
    masked = ruled or biased or anchors.names is not None
    precision = fast_precision_of(dtype, architecture(p.device), masked) if hard else precision_of(dtype)
    return Arranged(anchors, others, self_contrast, normed, biased, precision, rule_flags), a, c


def _rows(
    source: Tensor,
    dtype: torch.dtype,
    order: Tensor | None,
    clusters: tuple[Tensor | None, Tensor | None],
    names: Tensor | None,
    bias: Tensor | None,
    leave_out: bool,
    normalize: bool,
    normed: bool,
    norms: Tensor,
    first: bool,
) -> SortedRows:
    """clusters: of these rows and of the other set's rows. norms: [n], filled in, or [0].

    first: in a forward, where rows with infinite numbers become NaN unless they are normalised (see `infinite`).
    leave_out: rows whose bias is -inf become zeros: as anchors of the other direction they are left out too.
    """
    n, d = source.shape
    width = padded(d, INTERPRETED)
    source = source.detach().resolve_neg()
    scaled = normalize and dtype == torch.float16
    as_it_is = order is None and width == d and source.dtype == dtype and source.is_contiguous()
    # A normalised row out of range is multiplied by a power of two.
    as_it_is = as_it_is and not (normalize or leave_out or first)
    own, other = clusters

    def new(dtype: torch.dtype, there: bool) -> Tensor | None:
        return torch.empty(n, dtype=dtype, device=source.device) if there else None

    start, end = (new(torch.int32, own is not None) for _ in range(2))
    rows = SortedRows(
        source if as_it_is else torch.empty(n, width, dtype=dtype, device=source.device),
        order,
        new(torch.float32, normed),
        start,
        end,
        new(torch.int32, names is not None),
        new(torch.float32, bias is not None),
        new(torch.float32, not (normalize or as_it_is)),  # the backward does not read it; both use one kernel
    )
    if as_it_is and not normed and own is None and names is None and bias is None:
        return rows
    given = {
        "ORDER": order,
        "NUMBERS": own,
        "OTHER_NUMBERS": other,
        "SOURCE_NAMES": names,
        "SOURCE_BIAS": None if bias is None else bias.resolve_neg().contiguous(),
        "ROWS": None if as_it_is else rows.rows,
        "NORMS": norms if norms.numel() else None,
        "ROW_NORMS": rows.inverse_norms,
        "LENGTHS": rows.lengths,
        "START": start,
        "END": end,
        "ROW_NAMES": rows.names,
        "ROW_BIAS": rows.bias,
        "M": 0 if other is None else len(other),
        "STEPS": 0 if other is None else len(other).bit_length(),
        "NORMALIZE": normalize,
        "SCALED": scaled,
        "LEAVE_OUT": leave_out,
        "CHECKED": int(first),
    }
    _launch_rows(source, given)
    return rows


def new_inverse_norms(source: Tensor) -> Tensor:
    """The inverse norms [n] of rows."""
    norms = torch.empty(len(source), dtype=torch.float32, device=source.device)
    tensors = "ORDER NUMBERS OTHER_NUMBERS SOURCE_NAMES SOURCE_BIAS ROWS ROW_NORMS LENGTHS START END ROW_NAMES ROW_BIAS"
    numbers = {"M": 0, "STEPS": 0, "SCALED": False, "LEAVE_OUT": False, "NORMALIZE": True, "CHECKED": 0}
    _launch_rows(source, dict.fromkeys(tensors.split()) | numbers | {"NORMS": norms})
    return norms


def _launch_rows(source: Tensor, given: dict[str, Any]) -> None:
    n, d = source.shape
    width = padded(d, INTERPRETED)
    shape = arranging_tile(architecture(source.device), source.dtype, width, INTERPRETED)
    given = given | {
        "SOURCE": source,
        "N": n,
        "WIDTH": d,
        "ROW_STRIDE": source.stride(0),
        "COLUMN_STRIDE": source.stride(1),
        "FLOOR": NORM_FLOOR,
        "D": width,
        "BLOCK_M": shape.block_m,
        "BLOCK_D": shape.block_d,
        "INTERPRETED": INTERPRETED,
    }
    triton_launch.launch("rows_kernel", shape, (blocks(n, shape.block_m),), given)


# Rules about pairs.


def name_rules(p: Problem, parts: dict[str, Tensor]) -> None:
    """Fills in the int32 names of the data that is compared: half as many registers as int64."""
    for name in _named(p):
        names = places_of_ids(getattr(p.anchors, name), getattr(p.others, name))
        for side, found in zip(("anchors", "contrasts"), names, strict=True):
            if found is not None and f"{name} of {side}" in parts:
                parts[f"{name} of {side}"].copy_(found)


def with_rules(
    p: Problem, parts: dict[str, Tensor], anchors: SortedRows, contrasts: SortedRows
) -> tuple[SortedRows, SortedRows, dict[str, Any]]:
    """The sorted rows with the data of rules in their order, and the flags of the kernels with rules."""
    own, other = p.anchors, p.others
    anchor_rules: dict[str, Tensor | None] = {}
    contrast_rules: dict[str, Tensor | None] = {}
    flags: dict[str, Any] = {"WORDS": 0 if own.tags is None else own.tags.shape[1], "SELF": p.contrasts is None}

    def ordered(values: Tensor, rows: SortedRows) -> Tensor:
        values = values.detach()
        return (values if rows.order is None else values.index_select(-1, rows.order)).contiguous()

    compared = [
        (name.upper(), parts[f"{name} of anchors"], parts.get(f"{name} of contrasts", parts[f"{name} of anchors"]))
        for name in _named(p)
    ]
    if own.tags is not None and other.tags is not None:
        compared.append(("TAGS", own.tags.T, other.tags.T))
    for name, left, right in compared:
        anchor_rules[name] = ordered(left, anchors)
        contrast_rules[name] = anchor_rules[name] if own is other else ordered(right, contrasts)
    guide = 0
    if own.guide is not None and other.guide is not None and own.thresholds is not None:
        dtype = torch.promote_types(own.guide.dtype, other.guide.dtype)
        dtype = torch.float32 if dtype == torch.float64 else dtype
        nothing = own.thresholds.new_empty(0)

        def arranged(rows: Tensor, like: SortedRows) -> dict[str, Tensor | None]:
            rows = rows.to(dtype)
            unit = _rows(rows, dtype, like.order, (None, None), None, None, False, True, True, nothing, False)
            return {"GUIDE": unit.rows, "GUIDE_NORMS": unit.inverse_norms}

        left_guide = arranged(own.guide, anchors)
        anchor_rules |= left_guide | {"THRESHOLDS": ordered(own.thresholds.to(torch.float32), anchors)}
        contrast_rules |= left_guide if own is other else arranged(other.guide, contrasts)
        guide = padded(own.guide.shape[1], INTERPRETED)
        # Which pairs are admissible must not depend on PyTorch's precision of products.
        flags["GUIDE_PRECISION"] = "tf32x3" if dtype == torch.float32 and architecture(p.device) >= 90 else "ieee"
        flags["BLOCK_G"] = min(guide & -guide, 512 if INTERPRETED else guide_width(dtype))
    flags = {"GUIDE": guide, "BLOCK_G": 0, "GUIDE_PRECISION": "ieee"} | flags
    return replace(anchors, rules=anchor_rules), replace(contrasts, rules=contrast_rules), flags


# Clusters and ids.


def number_clusters(anchors: Tensor | None, contrasts: Tensor | None, parts: dict[str, Tensor]) -> None:
    """Fills in the order of rows and their cluster numbers in ascending order, if there are clusters.

    The number of a cluster is the place of its first anchor, so results do not depend on the names of clusters. An
    anchor without a cluster gets one of its own. Contrasts without an anchor in their cluster come last.
    """
    if anchors is None:
        return
    few = max(len(anchors), 0 if contrasts is None else len(contrasts)) <= MOST_COMPARED
    known, order = (anchors.contiguous(), None) if few else torch.sort(anchors, stable=True)
    for ids, prefix in ((anchors, ""), (contrasts, "contrast_")):
        if ids is not None:
            labels = torch.empty(len(ids), dtype=torch.int32, device=ids.device)
            clusters, places = parts[prefix + "clusters"], parts[prefix + "order"]
            if order is None:
                _sort_few(ids, known, labels, clusters, places, ids is anchors)
            else:
                _label(ids, known, order, labels, ids is anchors)
                torch.sort(labels, stable=True, out=(clusters, places))


def _sort_few(ids: Tensor, known: Tensor, labels: Tensor, clusters: Tensor, order: Tensor, own: bool) -> None:
    """Fills in the cluster number of each id, these in ascending order, and the order."""
    n, block = len(ids), 512 if INTERPRETED else COMPARED.block_m
    given: dict[str, Any] = {"VALUES": ids.contiguous(), "KNOWN": known, "LABELS": labels, "N": n, "M": len(known)}
    given |= {"SAME": int(own), "BLOCK": block, "NUMBERS": clusters, "ORDER": order}
    for kernel in ("first_kernel", "order_kernel"):
        triton_launch.launch(kernel, COMPARED, (blocks(n, block),), given)


def name_ids(left: Tensor | None, right: Tensor | None, parts: dict[str, Tensor]) -> None:
    """Fills in int32 names of ids: their places in the sorted ids of the right set."""
    if left is None or right is None:
        return
    known = right.sort().values
    for ids, name in ((left, "names"), (right, "contrast_names")):
        _label(ids, known, None, parts[name], False)


def _label(ids: Tensor, known: Tensor, order: Tensor | None, labels: Tensor, own: bool) -> None:
    triton_launch.launch(
        "labels_kernel",
        ROWS_AT_ONCE,
        (blocks(len(ids), ROWS_AT_ONCE.block_m),),
        {
            "VALUES": ids.contiguous(),
            "SORTED": known,
            "ORDER": order,
            "LABELS": labels,
            "N": len(ids),
            "M": len(known),
            "STEPS": len(known).bit_length(),
            "OWN": own,
            "BLOCK": ROWS_AT_ONCE.block_m,
        },
    )


@dataclass(frozen=True)
class Launch:
    """The arguments that all kernels of a call share."""

    rows: SortedRows
    columns: SortedRows
    flags: dict[str, Any]
    ruled: bool  # whether the kernels are those with rules

    @classmethod
    def of(cls, arranged: Arranged, rows: SortedRows, columns: SortedRows) -> Launch:
        flags = {
            "CLUSTERS": rows.start is not None,
            "IDS": rows.names is not None,
            "NORMED": arranged.normed,
            "BIAS": 0 if not arranged.biased else 1 if columns.bias is not None else 2,
            "PRECISION": arranged.precision,
            "INTERPRETED": INTERPRETED,
            "SELF": arranged.self_contrast,
        }
        return cls(rows, columns, flags | (arranged.rule_flags or {}), arranged.rule_flags is not None)

    @property
    def size(self) -> int:
        return self.rows.rows.shape[0]

    def row_blocks(self, shape: Tile) -> tuple[int]:
        """The grid of a program for each row block."""
        return (blocks(self.size, shape.block_m),)

    def grid(self, shape: Tile) -> tuple[int, int]:
        """The grid of a program for each row block and part of D."""
        return blocks(self.size, shape.block_m), blocks(self.rows.rows.shape[1], shape.block_d)

    def column_parts(self, kind: str) -> int:
        """How many programs share the columns of a row block, so that few rows fill the device too.

        Every part has at least FEWEST_TILES tiles, and more parts must shorten the longest multiprocessor's work. The
        number depends on sizes and device only, and the parts are joined in order: the same bits on every run.
        """
        shape = self.tile(kind)
        rows = blocks(self.size, shape.block_m)
        if kind in ("weighted", "backward", "ruled_backward"):
            rows = rows * blocks(self.rows.rows.shape[1], shape.block_d)
        slots = PROGRAMS_AT_ONCE * programs(self.rows.rows.device)
        most = min(blocks(len(self.columns.rows), shape.block_n) // FEWEST_TILES, 2 * slots // rows)

        def work(parts: int) -> float:
            return blocks(rows * parts, slots) / parts

        best = 1
        for parts in range(2, most + 1):
            if work(parts) < 0.9 * work(best):
                best = parts
        return best

    def tile(self, kind: str, trial: triton_tuning.Trial | None = None) -> Tile:
        """The tile of the table, or the fastest one that the tuner found."""
        rows = self.rows.rows
        careful = self.flags["IDS"] or self.flags["BIAS"] != 0
        precision = self.flags["PRECISION"]
        found = tile(
            kind, architecture(rows.device), rows.dtype, rows.shape[1], careful, precision == "tf32", INTERPRETED,
            precision == "tf32x3", triton_launch.is_old(),
        )  # fmt: skip
        of_rows = f"{str(rows.dtype)[6:]}{'' if precision == 'ieee' else f' {precision}'}, D = {rows.shape[1]}"
        key = f"{kind}, {device_name(rows.device)}, {of_rows}{', careful' if careful else ''}"
        return triton_tuning.choose(key, found, self.size * len(self.columns.rows), trial)

    def sweep(
        self,
        kind: str,
        kernel: str,
        grid: Callable[[Tile], Sequence[int]],
        *arguments: dict[str, Any],
        cleared: Tensor | None = None,
    ) -> None:
        """Clears the buffer that the kernel adds to, then launches it once per set of arguments."""

        def launch(shape: Tile) -> None:
            if cleared is not None:
                cleared.zero_()
            for given in arguments:
                own = shape if INTERPRETED else for_variant(shape, given, triton_launch.version())
                self.run(kernel, own, grid(shape), given)

        launch(self.tile(kind, launch))

    def run(self, kernel: str, shape: Tile, grid: Sequence[int], arguments: dict[str, Any]) -> None:
        """Launches a kernel with `arguments` and the shared arguments, by name."""
        rows, columns = self.rows, self.columns
        given = {
            "X": rows.rows,
            "Y": columns.rows,
            "A": rows.inverse_norms,
            "C": columns.inverse_norms,
            "ROW_BIAS": rows.bias,
            "COLUMN_BIAS": columns.bias,
            "START": rows.start,
            "END": rows.end,
            "ROW_NAMES": rows.names,
            "COLUMN_NAMES": columns.names,
            "ORDER": rows.order,
            "N": rows.rows.shape[0],
            "M": columns.rows.shape[0],
            "D": rows.rows.shape[1],
            **{f"ROW_{name}": rows.rules.get(name) for name in RULES if self.ruled},
            **{f"COLUMN_{name}": columns.rules.get(name) for name in RULES if self.ruled},
            "BLOCK_M": shape.block_m,
            "BLOCK_N": shape.block_n,
            "BLOCK_K": shape.block_k,
            "BLOCK_D": shape.block_d,
            **self.flags,
            **arguments,
        }
        triton_launch.launch(kernel, shape, grid, given)


def fields_wanted(p: Problem) -> dict[str, int]:
    """The place of each field among the wanted ones, -1 for others, as arguments of the kernels."""
    names = {"ALL": "lse_all", "POS": "lse_pos", "NEG": "lse_neg", "SUM": "sum_pos"}
    places = {key: p.want.index(name) if name in p.want else -1 for key, name in names.items()}
    return places | {"LOG_SUMS": len(p.log_sums)}
