"""Statistics over blocks of contrasts, such as those of other processes.

The forward sweeps each block and merges the sums. The backward sweeps the blocks again, with the merged sums. An
`Exchange` (`fastcl.exchange`) brings the blocks and returns their gradients to the processes that own them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends.rows import inverse_norms
from ..library import once_differentiable, uncompiled, without_autocast
from . import one_way, own_contrasts
from .backend import Backend
from .direct import stacked, taken_apart
from .fields import log_sums
from .observed import merge as merge_observed
from .observed import nothing as nothing_observed
from .op import BACKENDS, swept_gradients, swept_statistics
from .records import (
    OF_ROWS,
    TENSORS,
    Gradients,
    Needs,
    Problem,
    Rows,
    Side,
    Statistics,
    gradient_places,
    travelling,
    unflatten,
    unflatten_rows,
)

Place = slice  # where a block is among the contrasts of all processes
Visit = Callable[[Place, Tensor | None], Tensor | None]


class Exchange(Protocol):
    """Moves rows and numbers of contrasts between the process that owns them and all others.

    The process owns m contrasts; all processes have M. The order of blocks is the same in every walk.
    """

    total: int  # M
    own: Place
    places: list[Place]  # of each process's contrasts
    processes: int

    def walk(self, rows: Tensor, alone: bool, visit: Visit) -> Any:
        """Visits the rows of all contrasts, block by block.

        alone: the own rows are a block of their own, and the visit gets None in place of them.
        """

    def walk_back(self, kept: Any, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        """The same walk again, for gradients of rows. A visit returns the gradient of its block, in `dtype`.

        Returns the gradient of the own rows [m, D], summed over processes; None if dtype is None: no row needs one.

        kept: what `walk` returned.
        """

    def gradients(self, kept: Any, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        """`walk_back` without the sum over processes: [M, D], this process's part of each gradient.

        Only where every process has all contrasts.
        """

    def spread(self, values: Tensor) -> Tensor:
        """Gathers the values [..., m] of all processes: [..., M]."""

    def spread_rows(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Gathers tensors [m, ...] of any dtypes in one exchange: [M, ...] each."""

    def collect(self, values: Tensor) -> Tensor:
        """Sends values [K, M] to the contrasts' owners. Returns [processes, K, m], each process's values of the own
        contrasts."""

    def summed(self, values: Tensor) -> Tensor:
        """The sum over processes of values [M, ...], for the own contrasts: [m, ...]."""

    def summed_with(self, values: Sequence[Tensor], number: Tensor) -> tuple[list[Tensor], Tensor]:
        """`summed` of tensors of one dtype, and the numbers [] of all processes: [processes]."""

    def everyone(self, values: Tensor) -> Tensor:
        """Gathers the values [n] of all processes, the same n in each: [processes, n]."""


@dataclass(frozen=True)
class Call:
    """The arguments of `BlockStats` besides the problem."""

    exchange: Exchange
    backend: str
    exact: bool
    one_scale: bool
    contrasts_need: bool  # whether the travelling contrasts need a gradient, the same in all processes
    bias_needs: bool  # the same of their bias
    # By field of `Rows`: data [M, ...] of all travelling contrasts that need not be sent.
    known: Mapping[str, Tensor] = field(default_factory=dict)


def data_of_all(exchange: Exchange, own: Rows, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By field of `Rows` the data [M, ...] of all travelling contrasts. own: this process's [m]. known: see `Call`."""
    sent = {name: values for name, values in travelling(own).items() if name not in known}
    arrived = exchange.spread_rows(list(sent.values())) if sent else []
    return {**known, **dict(zip(sent, arrived, strict=True))}


class BlockStats(torch.autograd.Function):
    """`DirectStats` of the anchors over the travelling contrasts of all processes and the own stored ones.

    With `both` also of the own travelling contrasts over the anchors of all processes. With `observe` the last value is
    the observed statistics, [10, S, N + m].
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *arguments: Any) -> tuple[Tensor, ...]:
        """arguments: `flatten` of the problem over the travelling contrasts, then `flatten_rows` of the stored ones."""
        blocks = Blocks(call, arguments)
        p = blocks.base
        with without_autocast(p.device):
            found = blocks.forward()
        ctx.save_for_backward(*arguments[:TENSORS], *arguments[-OF_ROWS:])
        ctx.call, ctx.options, ctx.kept = call, arguments[TENSORS:-OF_ROWS], blocks.kept
        sides = found.anchors, found.contrasts
        values = tuple(taken_apart((*sides[0][:3], *sides[1][:3]), call.one_scale, p.want, p.both, call.exact))
        side = len(p.want) + 2
        fixed = [value for k, value in enumerate(values) if k % side >= side - 2]
        if p.observe:
            values = (*values, torch.cat([one.observed for one in sides if one.observed is not None], -1))
            fixed.append(values[-1])
        ctx.mark_non_differentiable(*fixed)
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
        """Gradients of the inputs. tensors: gradients of the `count` values, then what the forward saved."""
        grads, saved = tensors[:count], tensors[count:]
        arguments = (*saved[:TENSORS], *ctx.options, *saved[TENSORS:])
        blocks = Blocks(ctx.call, arguments)
        blocks.kept = ctx.kept
        p = blocks.base
        scales, wanted = p.logit_scale, len(p.want)
        of_sides = []
        for k, n in enumerate((len(p.anchors.values), blocks.own_size)):
            start = k * (wanted + 2)
            grad = stacked(grads[start : start + wanted]) if wanted else None
            blank = scales.new_zeros(wanted, len(scales), n if k == 0 or p.both else 0)
            of_sides.append(blank if grad is None else grad.to(scales.dtype))
        needed: Sequence[bool] = ctx.needs_input_grad[1:]
        places = gradient_places(arguments)
        needs = Needs(*(needed[place] for place in places))
        stored_bias = len(arguments) - OF_ROWS + Rows._fields.index("bias")
        with without_autocast(p.device):
            found, of_stored_bias = blocks.backward(of_sides[0], of_sides[1], needs, needed[stored_bias])
        return None, *blocks.by_argument(arguments, found, needed, of_stored_bias)


class Kept(NamedTuple):
    """What the forward leaves for the backward."""

    rows: Any  # what `Exchange.walk` returned
    data: Mapping[str, Tensor]  # of `data_of_all`
    # By the block's first row: inverse norms of anchors and contrasts, and `Statistics.saved`.
    of_blocks: dict[int, tuple[Tensor, Tensor, Tensor]]
    anchors: Side  # merged
    planes: Tensor  # [P, S, N], merged
    contrasts: Tensor | None  # [K, m]: the own contrasts' merged statistics, as `Layout` packs them


class _Found(NamedTuple):
    """What `Blocks.sweep` returns."""

    statistics: Statistics  # of the anchors
    of_contrasts: Tensor  # [K, M] with `both`, else [K, 0]: packed by `Layout`, over this process's anchors
    seen_contrasts: Tensor  # the same of observed statistics


STORED = -1  # the key of the stored contrasts in `Kept.of_blocks`


class Blocks:
    """A forward or backward, block by block."""

    kept: Kept

    def __init__(self, call: Call, arguments: Sequence[Any]) -> None:
        self.call, self.exchange = call, call.exchange
        self.backend: Backend = BACKENDS[call.backend]
        # The anchors among themselves, or with the own travelling contrasts.
        self.base = base = replace(unflatten(arguments[:-OF_ROWS]), partial=True)
        self.alone = base.contrasts is None
        self.stored = unflatten_rows(arguments[-OF_ROWS:], base.others.normalize)
        self.own_size = len(base.others.values)
        self.layout = self.layout_of(call, base)

    @staticmethod
    def layout_of(call: Call, p: Problem) -> Layout:
        return Layout(tuple(p.want), len(p.logit_scale), BACKENDS[call.backend].plane_count(p))

    def block(self, place: Place, rows: Tensor | None) -> Problem:
        """The anchors with a block of the travelling contrasts. rows: None for the own rows in self-contrast."""
        if rows is None:
            return self.base
        here = {name: values[place] for name, values in self.kept.data.items()}
        return self.over(Rows(rows, normalize=self.base.others.normalize, **here))

    def over(self, contrasts: Rows) -> Problem:
        """The anchors with these contrasts."""
        return replace(self.base, anchors=self.base.anchors._replace(bias=None), contrasts=contrasts)

    def sweep(self) -> _Found:
        """The statistics of the anchors, and this process's part of those of all contrasts."""
        base, layout = self.base, self.layout
        data = data_of_all(self.exchange, base.others, self.call.known)
        nothing = layout.side(layout.blank(base.logit_scale, 0), base.dtype)
        self.kept = Kept(None, data, {}, *nothing, None)
        first: tuple[Side, Tensor] | None = None  # of the first block
        sums: Tensor | None = None  # of several blocks
        of_contrasts = layout.blank(base.logit_scale, self.exchange.total if base.both else 0)
        s, m = len(base.logit_scale), self.exchange.total if base.both else 0
        seen, seen_contrasts = (nothing_observed(base.logit_scale, s, size) for size in (len(base.anchors.values), m))

        def add(key: int, p: Problem) -> None:
            nonlocal first, sums, seen
            if 0 in p.sizes[1:]:
                return
            found = swept_statistics(p, self.backend)
            planes = one_way.planes(p, self.backend, found.saved)
            if first is None:
                first = found.anchors, planes[0]
            else:
                known = layout.pack(*first) if sums is None else sums
                sums = layout.merge(torch.stack([known, layout.pack(found.anchors, planes[0])]), self.backend)
            self.kept.of_blocks[key] = found.anchor_inverse_norms, found.contrast_inverse_norms, found.saved
            if p.both:
                of_contrasts[:, key : key + p.sizes[2]] = layout.pack(found.contrasts, planes[1])
            if found.anchors.observed is not None:
                seen = merge_observed(seen, found.anchors.observed)
            if found.contrasts.observed is not None and p.both:
                seen_contrasts[..., key : key + p.sizes[2]] = found.contrasts.observed

        def visit(place: Place, rows: Tensor | None) -> None:
            add(place.start, self.block(place, rows))

        walked = self.exchange.walk(base.others.values, self.alone, visit)
        if self.stored is not None:
            add(STORED, self.over(self.stored))
        if first is None or sums is not None:
            sums = layout.blank(base.logit_scale, len(base.anchors.values)) if sums is None else sums
            first = layout.side(sums, base.dtype)
        anchors, planes = first
        if base.observe:
            anchors = anchors._replace(observed=seen)
        empty = base.logit_scale.new_empty(0)
        found = own_contrasts.join(base, Statistics(anchors, nothing[0], self._anchor_norms(), empty, empty))
        self.kept = self.kept._replace(rows=walked, anchors=found.anchors, planes=planes)
        # Sent in the dtype of the statistics, as a block's sums have no more digits.
        return _Found(found, of_contrasts.to(base.dtype), seen_contrasts)

    def forward(self) -> Statistics:
        base = self.base
        found, of_contrasts, seen_contrasts = self.sweep()
        if not base.both:
            return found
        merged = self.layout.merge(self.exchange.collect(of_contrasts).double(), self.backend)
        own, _ = self.layout.side(merged, base.dtype)
        self.kept = self.kept._replace(contrasts=merged.to(base.dtype))
        if base.observe:
            parts = self.exchange.collect(seen_contrasts.flatten(0, 1)).unflatten(1, seen_contrasts.shape[:2])
            own = own._replace(observed=reduce(merge_observed, parts.unbind()))
        return found._replace(contrasts=own)

    def _anchor_norms(self) -> Tensor:
        """Inverse norms of the anchors, [N], or [0] if they are not normalised."""
        if not self.base.anchors.normalize:
            return self.base.logit_scale.new_empty(0)
        for norms, *_ in self.kept.of_blocks.values():
            return norms
        return inverse_norms(self.base.anchors.values.to(self.base.dtype))

    def backward(
        self, grad: Tensor, grad_contrasts: Tensor, own: Needs, stored_bias: bool
    ) -> tuple[Gradients, Tensor | None]:
        """Gradients of the problem, and of the stored contrasts' bias.

        grad, grad_contrasts: gradients of the fields, [W, S, N] and, with `both`, [W, S, m].
        """
        kept, of_all = self.kept, None
        if kept.contrasts is not None:  # every process needs the merged statistics of all contrasts and their gradients
            of_all = self.exchange.spread(torch.cat([kept.contrasts, grad_contrasts.flatten(0, 1)]))
            size = len(kept.contrasts)
            of_all, grad_contrasts = of_all[:size], of_all[size:].unflatten(0, grad_contrasts.shape[:2])
        walk = partial(self.exchange.walk_back, kept.rows, self.base.others.values, self.alone)
        swept, of_bias = self.sweep_back(walk, grad, grad_contrasts, of_all, own, stored_bias)
        if swept.bias is not None:
            swept = swept._replace(bias=self.exchange.summed(swept.bias))
        return self.finished(swept, grad, own), of_bias

    def sweep_back(
        self,
        walk: Callable[[Visit, torch.dtype | None], Tensor | None],
        grad: Tensor,
        grad_contrasts: Tensor,
        of_contrasts: Tensor | None,
        own: Needs,
        stored_bias: bool,
    ) -> tuple[Gradients, Tensor | None]:
        """Gradients of one more sweep, that of the contrasts as `walk` returns it, and of the stored contrasts' bias.

        The bias's gradient [M] is this process's part. walk: visits the blocks again. grad, grad_contrasts: gradients
        of the fields, [W, S, N] and, with `both`, [W, S, M]. of_contrasts: with `both` the merged statistics [K, M].
        """
        base, call, kept = self.base, self.call, self.kept
        dx = torch.zeros_like(base.anchors.values, dtype=base.dtype)
        d_scale = torch.zeros_like(base.logit_scale, dtype=torch.float64)
        d_bias = base.logit_scale.new_zeros(self.exchange.total) if call.bias_needs else None
        blank = self.layout.blank(base.logit_scale, 0) if of_contrasts is None else of_contrasts.double()
        others_found, other_planes = self.layout.side(blank, base.dtype)

        def add(key: int, p: Problem, others: bool, bias: bool) -> Gradients | None:
            if 0 in p.sizes[1:]:
                return None
            a, c, saved = kept.of_blocks[key]
            planes = one_way.planes(p, self.backend, saved)
            planes[0].copy_(kept.planes)
            place = slice(key, key + p.sizes[2]) if p.both else slice(0)
            other = Side(*(part[..., place].contiguous() for part in others_found[:3]))
            if p.both:
                planes[1].copy_(other_planes[..., place])
            needs = own._replace(contrasts=others, bias=bias and p.others.bias is not None)
            known = Statistics(Side(grad, kept.anchors.counts, kept.anchors.parts), other, a, c, saved)
            found = swept_gradients(p, self.backend, known, grad, grad_contrasts[..., place].contiguous(), needs)
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
            if found.bias is not None and d_bias is not None:
                d_bias[place] = found.bias
            return found.contrasts if others else None

        of_bias = None
        if self.stored is not None:
            found = add(STORED, self.over(self.stored), False, stored_bias)
            if stored_bias and self.stored.bias is not None:
                of_bias = torch.zeros_like(self.stored.bias) if found is None else found.bias
        home = walk(visit, base.dtype if call.contrasts_need else None)
        return Gradients(dx, home, d_scale, d_bias), of_bias

    def finished(self, swept: Gradients, grad: Tensor, own: Needs) -> Gradients:
        """Gradients of the problem from those of its sweep, of which the contrasts' and the bias's are complete."""
        base, call = self.base, self.call
        if self.alone and swept.contrasts is not None and swept.anchors is not None:
            swept = swept._replace(anchors=swept.anchors + swept.contrasts, contrasts=None)
        no_numbers = base.logit_scale.new_empty(0)
        joined = Statistics(self.kept.anchors, self.kept.anchors, self._anchor_norms(), no_numbers, no_numbers)
        needs = own._replace(contrasts=call.contrasts_need, bias=call.bias_needs)
        return own_contrasts.add_gradients(base, joined, grad, needs, swept)

    @staticmethod
    def by_argument(
        arguments: Sequence[Any], found: Gradients, needed: Sequence[bool], of_stored_bias: Tensor | None
    ) -> list[Tensor | None]:
        """The needed gradients in the order of the arguments of `BlockStats`, in their dtypes."""
        result: list[Tensor | None] = [None] * len(arguments)
        for place, gradient in zip(gradient_places(arguments), found, strict=True):
            if gradient is not None and arguments[place] is not None and needed[place]:
                result[place] = gradient.to(arguments[place].dtype)
        result[len(arguments) - OF_ROWS + Rows._fields.index("bias")] = of_stored_bias
        return result


class Layout(NamedTuple):
    """Packs the statistics of one side into a float64 tensor [K, n], to be sent and merged."""

    want: tuple[str, ...]
    scales: int
    planes: int  # `Backend.plane_count`

    @property
    def log_sums(self) -> int:
        return len(log_sums(self.want))

    @property
    def width(self) -> int:
        """K"""
        return self.scales * (len(self.want) + self.log_sums + self.planes) + 2

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[..., K, n] -> plain sums [..., S for each, n], counts [..., 2, n], shifts and sums [..., L, S, n], planes.

        Plain sums are the wanted fields that are not log-sum-exps.
        """
        s, logs = self.scales, self.log_sums
        lengths = (s * (len(self.want) - logs), 2, logs * s, logs * s, self.planes * s)
        plain_sums, counts, *others = packed.split(lengths, -2)
        return plain_sums, counts, *(part.unflatten(-2, (-1 if part.shape[-2] else 0, s)) for part in others)

    def blank(self, like: Tensor, n: int) -> Tensor:
        """Packed statistics of n rows over no contrasts."""
        return like.new_zeros(self.width, n, dtype=torch.float64)

    def pack(self, side: Side, planes: Tensor) -> Tensor:
        plain_sums = side.fields[self.log_sums :].flatten(0, 1)
        return torch.cat([plain_sums, side.counts, *side.parts.flatten(1, 2), planes.flatten(0, 1)]).double()

    def merge(self, packed: Tensor, backend: Backend) -> Tensor:
        """Merges packed statistics [blocks, K, n] over disjoint contrasts into [K, n]."""
        plain_sums, counts, shifts, sums, planes = self.split(packed)
        there = sums != 0  # true for NaN
        shift = torch.where(there, shifts, -torch.inf).amax(0)
        shift = torch.where(shift == -torch.inf, 0, shift)
        each = torch.where(there, sums * (shifts - shift).exp(), 0)
        parts = [plain_sums.sum(0), counts.sum(0), shift.flatten(0, 1), each.sum(0).flatten(0, 1)]
        if self.planes:
            everything = each[:, 0] if "lse_all" in self.want else None
            parts.append(backend.merge_planes(planes, counts, everything).flatten(0, 1))
        return torch.cat(parts)

    def side(self, packed: Tensor, dtype: torch.dtype) -> tuple[Side, Tensor]:
        """Unpacks [K, n] into a `Side` and the planes [P, S, n]."""
        plain_sums, counts, shifts, sums, planes = self.split(packed)
        fields = torch.cat([(shifts + sums.log()).flatten(0, 1), plain_sums]).unflatten(0, (-1, self.scales))
        parts = torch.stack([shifts, sums])
        return Side(*(values.to(dtype).contiguous() for values in (fields, counts, parts))), planes.to(dtype)
