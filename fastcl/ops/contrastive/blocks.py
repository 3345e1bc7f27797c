"""Statistics over contrasts that lie elsewhere and come in blocks: each block is swept by itself, the sums are merged,
and the backward sweeps the blocks again, with the sums over all of them.

How blocks come, and how their gradients go home, is an `Exchange`'s business (`fastcl.distributed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends.rows import inverse_norms
from ..library import once_differentiable, uncompiled, without_autocast
from . import paired
from .direct import stacked, taken_apart
from .op import BACKENDS
from .records import Gradients, Needs, Problem, Side, Statistics

Place = slice  # of a block among the contrasts of all processes
Visit = Callable[[Place, Tensor | None], Tensor | None]


class Exchange(Protocol):
    """Rows and numbers that belong to contrasts, between the process whose contrasts they are and all others.

    Own contrasts are m, those of all processes M. The order of blocks is the same in every walk.
    """

    total: int  # M
    own: Place

    def walk(self, rows: Tensor, alone: bool, visit: Visit) -> Any:
        """Visits all contrasts' rows, block by block. alone: the own rows as a block for itself, and named by None."""

    def walk_back(self, kept: Any, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        """The same walk again. A visit returns its block's gradient, of `dtype`; the sum over processes of those of the
        own rows [m, D] is returned. kept: what `walk` returned. dtype None: nobody needs them."""

    def spread(self, values: Tensor) -> Tensor:
        """Each process's [..., m] -> [..., M]."""

    def collect(self, values: Tensor) -> Tensor:
        """What each process has found about each contrast, [K, M] -> [processes, K, m]."""

    def summed(self, values: Tensor) -> Tensor:
        """Sums over processes, [M] -> [m]."""


@dataclass(frozen=True)
class Call:
    """What a `BlockStats` is told besides tensors."""

    exchange: Exchange
    normalize_anchors: bool
    normalize_contrasts: bool
    want: tuple[str, ...]  # in the order of FIELDS
    both: bool
    backend: str
    exact: bool
    one_scale: bool
    contrasts_need: bool  # whether any process's contrasts need a gradient, and their bias
    bias_needs: bool
    clusters: Tensor | None = None  # [M], of all travelling contrasts, where nobody needs to be told them


class Set(NamedTuple):
    """Contrasts and what belongs to each; those that travel, or those that every process has of its own."""

    rows: Tensor | None  # [m, D]; None: none, or, of those that travel, the anchors themselves
    clusters: Tensor | None
    ids: Tensor | None
    bias: Tensor | None


class BlockStats(torch.autograd.Function):
    """As `DirectStats`: anchors over the travelling contrasts of all processes, and over stored ones of its own.

    With `both` also the own travelling contrasts over the anchors of all processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        anchors: Tensor,
        positives: Tensor | None,
        clusters: Tensor | None,
        ids: Tensor | None,
        scales: Tensor,
        *sets: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sweep = _Sweep(call, anchors, positives, clusters, ids, scales, Set(*sets[:4]), Set(*sets[4:]))
        with without_autocast(anchors.device):
            found = sweep.forward()
        ctx.save_for_backward(anchors, positives, clusters, ids, scales, *sets)
        ctx.call, ctx.kept = call, sweep.kept
        sides = found.anchors, found.contrasts
        values = taken_apart((*sides[0][:3], *sides[1][:3]), call.one_scale, call.want, call.both, call.exact)
        side = len(call.want) + 2
        ctx.mark_non_differentiable(*(value for k, value in enumerate(values) if k % side >= side - 2))
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        work = partial(BlockStats.gradients, ctx, len(grads))
        found: tuple[Tensor | None, ...] = once_differentiable("contrastive_stats", work, *grads, *ctx.saved_tensors)
        return found

    @staticmethod
    @uncompiled
    def gradients(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the inputs, from those of the values, the first `count` tensors; the others are what the forward saved."""
        call: Call = ctx.call
        grads = tensors[:count]
        anchors, positives, clusters, ids, scales, *sets = tensors[count:]
        assert anchors is not None
        assert scales is not None
        sweep = _Sweep(call, anchors, positives, clusters, ids, scales, Set(*sets[:4]), Set(*sets[4:]))
        sweep.kept = ctx.kept
        wanted = len(call.want)
        sizes = len(anchors), sweep.own_size
        of_sides = []
        for k, n in enumerate(sizes):
            start = k * (wanted + 2)
            grad = stacked(grads[start : start + wanted]) if wanted else None
            blank = scales.new_zeros(wanted, len(scales), n if k == 0 or call.both else 0)
            of_sides.append(blank if grad is None else grad.to(scales.dtype))
        needs = ctx.needs_input_grad
        with without_autocast(anchors.device):
            found, stored_bias = sweep.backward(of_sides[0], of_sides[1], needs[1], needs[2], needs[5], needs[13])
        rows, contrasts, scale, bias, extra = (
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(found, (anchors, sets[0], scales, scales, positives), strict=True)
        )
        return (
            None, rows if needs[1] else None, extra, None, None, scale if needs[5] else None,
            contrasts if needs[6] else None, None, None, bias if needs[9] else None, None, None, None, stored_bias,
        )  # fmt: skip


class _Kept(NamedTuple):
    """What the forward leaves for the backward."""

    rows: Any  # the exchange's
    clusters: Tensor | None  # [M], and ids, bias
    ids: Tensor | None
    bias: Tensor | None
    of_blocks: dict[int, tuple[Tensor, Tensor, Tensor]]  # by their first row: inverse norms, and what backends save
    anchors: Side  # merged
    planes: Tensor
    contrasts: Tensor | None  # [K, m]: merged, of the own contrasts, as `Layout` packs it


STORED = -1  # the place of stored contrasts among `_Kept.of_blocks`


class _Sweep:
    """A sweep over blocks, forward or backward."""

    kept: _Kept

    def __init__(
        self,
        call: Call,
        anchors: Tensor,
        positives: Tensor | None,
        clusters: Tensor | None,
        ids: Tensor | None,
        scales: Tensor,
        travelling: Set,
        stored: Set,
    ) -> None:
        self.call, self.exchange, self.travelling, self.stored = call, call.exchange, travelling, stored
        self.backend: ModuleType = BACKENDS[call.backend]
        # The anchors among themselves, or with their own contrasts.
        self.base = Problem(
            anchors=anchors,
            contrasts=travelling.rows,
            paired=positives,
            anchor_clusters=clusters,
            contrast_clusters=travelling.clusters,
            logit_scale=scales,
            contrast_bias=travelling.bias,
            anchor_ids=ids,
            contrast_ids=travelling.ids,
            normalize_anchors=call.normalize_anchors,
            normalize_contrasts=call.normalize_contrasts,
            want=call.want,
            both=call.both,
            partial=True,
        )
        self.alone = travelling.rows is None
        self.rows = anchors if travelling.rows is None else travelling.rows
        self.own_size = len(self.rows)
        self.layout = Layout(
            call.want, len(scales), self.backend.plane_count(self.base) if hasattr(self.backend, "planes") else 0
        )

    # Blocks as problems.

    def block(self, place: Place, rows: Tensor | None) -> Problem:
        if rows is None:
            return self.base

        def here(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[place]

        p = replace(
            self.base,
            contrasts=rows,
            contrast_clusters=here(self.kept.clusters),
            contrast_bias=here(self.kept.bias),
            contrast_ids=here(self.kept.ids),
        )
        return replace(p, normalize_contrasts=p.normalize_anchors) if self.alone else p

    def block_of_stored(self) -> Problem:
        rows, clusters, ids, bias = self.stored
        return replace(self.base, contrasts=rows, contrast_clusters=clusters, contrast_ids=ids, contrast_bias=bias)

    def planes(self, p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
        """Of what the backend has saved, the numbers of rows and of columns that are merged, [P, S, .]; views."""
        if self.layout.planes:
            found: tuple[Tensor, Tensor] = self.backend.planes(p, saved)
            return found
        s, n, m = p.sizes
        return saved.new_empty(0, s, n), saved.new_empty(0, s, m if p.both else 0)

    # Forward.

    def forward(self) -> Statistics:
        base, layout = self.base, self.layout

        clusters = base.anchor_clusters if self.alone else self.travelling.clusters
        known = self.call.clusters
        found_clusters, ids, bias = self._spread(
            (clusters if known is None else None, base.contrast_ids, base.contrast_bias)
        )
        clusters = found_clusters if known is None else known
        nothing = layout.side(layout.blank(base.logit_scale, 0), base.dtype)
        self.kept = _Kept(None, clusters, ids, bias, {}, *nothing, None)
        sums = layout.blank(base.logit_scale, len(base.anchors))
        columns = layout.blank(base.logit_scale, self.exchange.total if base.both else 0)

        def add(key: int, p: Problem) -> None:
            nonlocal sums
            if 0 in p.sizes[1:]:
                return
            found: Statistics = self.backend.forward(p)
            planes = self.planes(p, found.saved)
            sums = layout.merge(torch.stack([sums, layout.pack(found.anchors, planes[0])]), self.backend)
            self.kept.of_blocks[key] = found.anchor_inverse_norms, found.contrast_inverse_norms, found.saved
            if p.both:
                columns[:, key : key + p.sizes[2]] = layout.pack(found.contrasts, planes[1])

        def visit(place: Place, rows: Tensor | None) -> None:
            add(place.start, self.block(place, rows))

        walked = self.exchange.walk(self.rows, self.alone, visit)
        if self.stored.rows is not None:
            add(STORED, self.block_of_stored())
        anchors, planes = layout.side(sums, base.dtype)
        merged, own = None, nothing[0]
        if base.both:
            # In the dtype of the statistics: the sums of a block have no more digits.
            merged = layout.merge(self.exchange.collect(columns.to(base.dtype)).double(), self.backend)
            own, _ = layout.side(merged, base.dtype)
            merged = merged.to(base.dtype)
        empty = base.logit_scale.new_empty(0)
        found = paired.join(base, Statistics(anchors, own, self._anchor_norms(), empty, empty))
        self.kept = self.kept._replace(rows=walked, anchors=found.anchors, planes=planes, contrasts=merged)
        return found

    def _spread(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Integers or floating numbers [m] -> [M], all of them at once: the bits of the latter travel as integers."""
        given = [one for one in values if one is not None]
        if not given:
            return [None] * len(values)
        sent = [one.double().view(torch.int64) if one.is_floating_point() else one for one in given]
        arrived = iter(self.exchange.spread(torch.stack(sent)))

        def taken(like: Tensor | None) -> Tensor | None:
            if like is None:
                return None
            one: Tensor = next(arrived)
            return one.view(torch.float64).to(like.dtype) if like.is_floating_point() else one

        return [taken(like) for like in values]

    def _anchor_norms(self) -> Tensor:
        """[N], where the anchors are normalised; else [0]."""
        if not self.base.normalize_anchors:
            return self.base.logit_scale.new_empty(0)
        for norms, *_ in self.kept.of_blocks.values():
            return norms
        return inverse_norms(self.base.anchors.to(self.base.dtype))

    # Backward.

    def backward(
        self, grad: Tensor, grad_contrasts: Tensor, rows: bool, positives: bool, scale: bool, stored_bias: bool
    ) -> tuple[Gradients, Tensor | None]:
        """Gradients from those of the fields, [W, S, N] and [W, S, m]; and that of the stored contrasts' bias."""
        base, call, kept = self.base, self.call, self.kept
        dx = torch.zeros_like(base.anchors, dtype=base.dtype)
        d_scale = torch.zeros_like(base.logit_scale, dtype=torch.float64)
        d_bias = base.logit_scale.new_zeros(self.exchange.total if call.bias_needs else 0)
        columns = grad_contrasts
        nobody = others_found, other_planes = self.layout.side(self.layout.blank(base.logit_scale, 0), base.dtype)
        if kept.contrasts is not None:  # what their processes have merged and received, everywhere
            everyone = self.exchange.spread(torch.cat([kept.contrasts, grad_contrasts.flatten(0, 1)]))
            size = len(kept.contrasts)
            others_found, other_planes = self.layout.side(everyone[:size].double(), base.dtype)
            columns = everyone[size:].unflatten(0, grad_contrasts.shape[:2])

        def add(key: int, p: Problem, others: bool, bias: bool) -> Gradients | None:
            if 0 in p.sizes[1:]:
                return None
            a, c, saved = kept.of_blocks[key]
            planes = self.planes(p, saved)
            planes[0].copy_(kept.planes)
            side, of_columns = Side(grad, kept.anchors.counts, kept.anchors.parts), grad_contrasts[..., :0]
            other = nobody[0]
            if p.both:
                place = slice(key, key + p.sizes[2])
                planes[1].copy_(other_planes[..., place])
                other = Side(*(part[..., place].contiguous() for part in others_found[:3]))
                of_columns = columns[..., place].contiguous()
            needs = Needs(rows, others, scale, bias and p.contrast_bias is not None, positives)
            found: Gradients = self.backend.backward(p, Statistics(side, other, a, c, saved), grad, of_columns, needs)
            if found.anchors is not None:
                dx.add_(found.anchors)
            if found.logit_scale is not None:
                d_scale.add_(found.logit_scale)
            return found

        def visit(place: Place, block: Tensor | None) -> Tensor | None:
            others = call.contrasts_need and block is not None
            found = add(place.start, self.block(place, block), others, call.bias_needs)
            if found is None:
                return None
            if found.contrast_bias is not None and call.bias_needs:
                d_bias[place] = found.contrast_bias
            return found.contrasts if others else None

        of_bias = None
        if self.stored.rows is not None:
            found = add(STORED, self.block_of_stored(), False, stored_bias)
            if stored_bias and self.stored.bias is not None:
                of_bias = torch.zeros_like(self.stored.bias) if found is None else found.contrast_bias
        dtype = base.dtype if call.contrasts_need else None
        home = self.exchange.walk_back(kept.rows, self.rows, self.alone, visit, dtype)
        if self.alone and home is not None:
            dx += home
        empty = base.logit_scale.new_empty(0)
        joined = Statistics(kept.anchors, kept.anchors, self._anchor_norms(), empty, empty)
        own_bias = self.exchange.summed(d_bias) if call.bias_needs else None
        swept = Gradients(dx, None if self.alone else home, d_scale, own_bias)
        needs = Needs(rows, call.contrasts_need, scale, call.bias_needs, positives)
        return paired.add_gradients(base, joined, grad, needs, swept), of_bias


class Layout(NamedTuple):
    """How one side's statistics lie in one tensor [K, n] of float64, to be sent and merged."""

    want: tuple[str, ...]
    scales: int
    planes: int  # numbers of each row and scale that a backend wants to find again, and can merge

    @property
    def log_sums(self) -> int:
        return sum(field != "sum_pos" for field in self.want)

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[..., K, n] -> sum_pos [..., 0 or S, n], counts [..., 2, n], shifts and sums [..., L, S, n], planes."""
        s, logs = self.scales, self.log_sums
        lengths = (s * (len(self.want) - logs), 2, logs * s, logs * s, self.planes * s)
        sum_pos, counts, *others = packed.split(lengths, -2)
        return sum_pos, counts, *(part.unflatten(-2, (-1 if part.shape[-2] else 0, s)) for part in others)

    def blank(self, like: Tensor, n: int) -> Tensor:
        """Statistics over nothing."""
        logs = self.log_sums
        return like.new_zeros(self.scales * (len(self.want) + logs + self.planes) + 2, n, dtype=torch.float64)

    def pack(self, side: Side, planes: Tensor) -> Tensor:
        sum_pos = side.fields[self.log_sums :].flatten(0, 1)
        return torch.cat([sum_pos, side.counts, *side.parts.flatten(1, 2), planes.flatten(0, 1)]).double()

    def merge(self, packed: Tensor, backend: ModuleType) -> Tensor:
        """[blocks, K, n] -> [K, n]"""
        sum_pos, counts, shifts, sums, planes = self.split(packed)
        there = sums != 0  # also where it is NaN
        shift = torch.where(there, shifts, -torch.inf).amax(0)
        shift = torch.where(shift == -torch.inf, 0, shift)
        each = torch.where(there, sums * (shifts - shift).exp(), 0)
        parts = [sum_pos.sum(0), counts.sum(0), shift.flatten(0, 1), each.sum(0).flatten(0, 1)]
        if self.planes:
            everything = each[:, 0] if self.want[0] == "lse_all" else None
            parts.append(backend.merge_planes(planes, counts, everything).flatten(0, 1))
        return torch.cat(parts)

    def side(self, packed: Tensor, dtype: torch.dtype) -> tuple[Side, Tensor]:
        """And the planes [P, S, n]."""
        sum_pos, counts, shifts, sums, planes = self.split(packed)
        fields = torch.cat([(shifts + sums.log()).flatten(0, 1), sum_pos]).unflatten(0, (-1, self.scales))
        parts = torch.stack([shifts, sums])
        return Side(*(values.to(dtype).contiguous() for values in (fields, counts, parts))), planes.to(dtype)
