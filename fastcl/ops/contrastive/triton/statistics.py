"""Backend ``triton``: prepares and launches the kernels of the forward.

The first call imports Triton. Nothing here waits for the device: sizes come from shapes, the device decides everything
that depends on values (shifts, which kernel applies), and scalars are tensors, so that a CUDA graph can replay the
calls with other values.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import triton_launch
from ...backends.triton_launch import INTERPRETED, blocks, on_device, programs
from ...backends.triton_tiles import ROWS_AT_ONCE, row_tile
from .. import chunked
from ..observed import PARTS
from ..records import Problem, Side, Statistics, empty_side, largest_bias, merge_bases, new_side
from . import triangle
from .mean import MOST_ROWS
from .rows import KEPT, Launch, SortedRows, arrange, fields_wanted

saved_size, planes, merge_planes = KEPT.size, KEPT.planes, merge_bases


def forward(p: Problem) -> Statistics:
    _, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.forward(p)._replace(saved=p.logit_scale.new_zeros(saved_size(p)))
    with on_device(p.device):
        return _forward(p)


def _observed(p: Problem, rows: Launch) -> Tensor:
    """`Side.observed` of the launch's rows, from a separate sweep."""
    s = p.sizes[0]
    observed = p.logit_scale.new_empty(s, len(PARTS), rows.size)
    kernel = "ruled_observation_kernel" if rows.ruled else "observation_kernel"
    shape = rows.tile("ruled_observation")  # with or without rules, every tile is masked
    for k in range(s):
        arguments = {"SCALE": p.logit_scale[k : k + 1], "OBSERVED": observed[k]}
        rows.run(kernel, shape, rows.row_blocks(shape), arguments)
    return observed.transpose(0, 1).contiguous()


# Forward.


def _forward(p: Problem) -> Statistics:
    saved = p.logit_scale.new_zeros(saved_size(p))
    parts = KEPT.parts(p, saved)
    arranged, a, c = arrange(p, parts)
    s, n, m = p.sizes
    new = p.logit_scale.new_empty
    statistics = new(s, 7, n)
    rows = Launch.of(arranged, arranged.anchors, arranged.contrasts)
    if "weighted" in parts:
        _weighted(p, rows, statistics[0], parts["weighted"])
        return Statistics(_side(p, statistics, m, parts["bases"], rows), empty_side(p), a, c, saved)
    others = new(s, 7, m if p.both else 0)
    columns = Launch.of(arranged, arranged.contrasts, arranged.anchors) if p.both else None
    if rows.ruled:
        for launch, found in ((rows, statistics), (columns, others)):
            if launch is not None:
                for k in range(s):
                    _ruled(launch, p.logit_scale[k : k + 1], found[k])
        return _joined(p, statistics, others, parts, rows, columns, a, c, saved)
    longest = _longest(p, arranged.anchors, arranged.contrasts)
    bias = None if p.others.bias is None else largest_bias(p.others.bias)
    bounds = {"LONGEST": longest, "LARGEST_BIAS": bias}
    for k in range(s):
        scalars: dict[str, Any] = bounds | {"SCALE": p.logit_scale[k : k + 1]}
        if columns is None:
            _one_way(rows, scalars, statistics[k])
        else:
            _two_ways(rows, columns, scalars, statistics[k], others[k])
        for launch, result in ((rows, statistics[k]), (columns, others[k])):
            if launch is not None:
                shape = launch.tile("running")  # usually returns at once, so there is nothing to tune
                apart = "lse_pos" in p.want or "lse_neg" in p.want
                arguments = scalars | {"STATISTICS": result, "APART": apart}
                launch.run("running_kernel", shape, launch.row_blocks(shape), arguments)
    return _joined(p, statistics, others, parts, rows, columns, a, c, saved)


def _joined(
    p: Problem,
    statistics: Tensor,
    others: Tensor,
    parts: dict[str, Tensor],
    rows: Launch,
    columns: Launch | None,
    a: Tensor,
    c: Tensor,
    saved: Tensor,
) -> Statistics:
    _, n, m = p.sizes
    contrasts = empty_side(p) if columns is None else _side(p, others, n, parts["contrast_bases"], columns)
    return Statistics(_side(p, statistics, m, parts["bases"], rows), contrasts, a, c, saved)


def _longest(p: Problem, rows: SortedRows, columns: SortedRows) -> Tensor | None:
    """The product of both sides' largest norms, [1]: a bound of |similarity|. None if both are normalised."""
    lengths, other = rows.lengths, columns.lengths
    if lengths is None and other is None:
        return None
    lengths, other = (
        each if each is None or len(each) <= MOST_ROWS else each.amax(0, keepdim=True) for each in (lengths, other)
    )
    longest = p.logit_scale.new_empty(1)
    n, m = (0 if each is None else len(each) for each in (lengths, other))
    given = {"LENGTHS": lengths, "OTHER_LENGTHS": other, "LONGEST": longest, "N": n, "M": m}
    triton_launch.launch("longest_kernel", ROWS_AT_ONCE, (1,), given | {"BLOCK": ROWS_AT_ONCE.block_m})
    return longest


def _ruled(rows: Launch, scale: Tensor, statistics: Tensor) -> None:
    """The statistics [7, n] of one side, with rules. The other side has a sweep of its own."""
    count = rows.column_parts("ruled_forward")
    parts = statistics if count == 1 else statistics.new_empty(count, *statistics.shape)
    arguments = {"SCALE": scale, "STATISTICS": parts, "SPLIT": count > 1}
    rows.sweep("ruled_forward", "ruled_statistics_kernel", lambda shape: (*rows.row_blocks(shape), count), arguments)
    if count > 1:
        _join(rows, parts, None, statistics, None)


def _one_way(rows: Launch, scalars: dict[str, Any], statistics: Tensor) -> None:
    if (found := triangle.shape_of(rows)) is not None:
        triangle.sweep(rows, scalars, statistics, *found)
        return
    count = rows.column_parts("forward")
    parts = statistics if count == 1 else statistics.new_empty(count, *statistics.shape)
    arguments = scalars | {"STATISTICS": parts, "MIXED_ONLY": False, "SPLIT": count > 1}
    rows.sweep("forward", "statistics_kernel", lambda shape: (*rows.row_blocks(shape), count), arguments)
    if count > 1:
        _join(rows, parts, None, statistics, None)


def _weighted(p: Problem, rows: Launch, statistics: Tensor, weighted: Tensor) -> None:
    """Fills in the statistics [7, n], and the weighted sums of contrasts [n, D]."""
    count = rows.column_parts("weighted")
    parts, sums = statistics, weighted
    if count > 1:
        parts, sums = (t.new_empty(count, *t.shape) for t in (statistics, weighted))
    arguments: dict[str, Any] = {"SCALE": p.logit_scale, "STATISTICS": parts, "WEIGHTED": sums}
    arguments |= {"WIDTH": weighted.shape[1], "SPLIT": count > 1}
    rows.sweep("weighted", "weighted_kernel", lambda shape: (*rows.grid(shape), count), arguments)
    if count > 1:
        _join(rows, parts, sums, statistics, weighted)


def _join(rows: Launch, parts: Tensor, sums: Tensor | None, statistics: Tensor, weighted: Tensor | None) -> None:
    """The statistics [7, n] and the weighted sums [n, D] of all columns, from those of parts of the columns."""
    shape = row_tile(rows.rows.rows.shape[1], INTERPRETED)
    width = 1 if weighted is None else weighted.shape[1]
    given = {
        "PARTS": parts,
        "WEIGHTED_PARTS": sums,
        "ORDER": rows.rows.order,
        "STATISTICS": statistics,
        "WEIGHTED": weighted,
        "N": rows.size,
        "WIDTH": width,
        "COUNT": len(parts),
        "BLOCK_M": shape.block_m,
        "BLOCK_D": shape.block_d,
    }
    triton_launch.launch("join_kernel", shape, (blocks(rows.size, shape.block_m), blocks(width, shape.block_d)), given)


def _two_ways(rows: Launch, columns: Launch, scalars: dict[str, Any], statistics: Tensor, others: Tensor) -> None:
    """Both sides from one sweep. The few tiles with positives are visited again for the columns."""
    number = min(*rows.row_blocks(rows.tile("two_way")), programs(statistics.device))
    sums = statistics.new_empty(number, columns.size)
    arguments = scalars | {"STATISTICS": statistics, "PARTIAL_SUMS": sums}
    rows.sweep("two_way", "two_way_kernel", lambda shape: (number,), arguments, cleared=sums)
    shape = columns.tile("forward")
    arguments = scalars | {"STATISTICS": others, "MIXED_ONLY": True, "SPLIT": False}
    columns.run("statistics_kernel", shape, columns.row_blocks(shape), arguments)
    n, block = columns.size, ROWS_AT_ONCE.block_m
    given = {"SUMS": sums, "ORDER": columns.rows.order, "TOTAL": others[1], "N": n, "COUNT": number, "BLOCK": block}
    triton_launch.launch("total_kernel", ROWS_AT_ONCE, (blocks(n, block),), given)


def _side(p: Problem, statistics: Tensor, pairs: int, bases: Tensor, rows: Launch) -> Side:
    """One side's fields, from the kernels' statistics [S, 7, n], and the bases [3, S, n] of its sums."""
    s, _, n = statistics.shape
    side = new_side(p, n)
    triton_launch.launch(
        "fields_kernel",
        ROWS_AT_ONCE,
        (blocks(n, ROWS_AT_ONCE.block_m), s),
        {
            "STATISTICS": statistics,
            "FIELDS": side.fields,
            "COUNTS": side.counts,
            "PARTS": side.parts,
            "BASES": bases,
            "N": n,
            "PAIRS": pairs,
            "BLOCK": ROWS_AT_ONCE.block_m,
            **fields_wanted(p),
        },
    )
    return side._replace(observed=_observed(p, rows)) if p.observe else side
