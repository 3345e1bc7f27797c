"""Statistics with soft assignments over the rows of all processes, for losses with `gather`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..exchange import Gathered, Ring
from ..ops.contrastive.blocks import Place
from ..ops.contrastive.records import Problem, Rows
from ..ops.library import once_differentiable, uncompiled
from ..ops.soft.op import at_unit
from ..swept import ContrastiveStats, statistics


class _AllRows(torch.autograd.Function):
    """Gathers the rows or numbers of contrasts from all processes. The backward sums their gradients over processes.

    This function and `_SummedRows` are each other's derivatives, so there are derivatives of any order.
    """

    @staticmethod
    def forward(ctx: Any, exchange: Gathered, rows: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.world.all_rows(rows, exchange.sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _SummedRows.apply(ctx.exchange, grad)


class _SummedRows(torch.autograd.Function):
    """The sum over processes, of which each process keeps its own rows."""

    @staticmethod
    def forward(ctx: Any, exchange: Gathered, values: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.summed(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _AllRows.apply(ctx.exchange, grad)


@dataclass(frozen=True)
class _Call:
    """A sweep of the ring besides its differentiable tensors."""

    exchange: Gathered
    problem: Problem  # of which the anchors' values, their assignments and the scale are replaced
    ids: Tensor | None  # [M]
    width: int  # D
    has_bias: bool
    normalize: bool


class _Swept(NamedTuple):
    """The fields of each anchor over a block, [N]. Sums of weights are in units of the block."""

    lse_all: Tensor
    sum_pos: Tensor
    num_pos: Tensor
    size: Tensor  # number of admissible contrasts
    unit: Tensor  # [], float64


class _RingStats(torch.autograd.Function):
    """lse_all, sum_pos, num_pos and the number of admissible contrasts, over blocks that travel one by one.

    Values, assignments and bias of a contrast travel as one row. The backward sweeps each block again.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, rows: Tensor, anchors: Tensor, own: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        found: list[_Swept] = []

        def visit(place: Place, block: Tensor | None) -> None:
            if block is not None and len(block):
                found.append(_over_block(call, block, place, anchors, own, scale))

        call.exchange.walk(rows, False, visit)
        n = anchors.new_zeros(len(anchors))
        if not found:
            unit = n.new_ones((), dtype=torch.float64)
            merged: tuple[Tensor, ...] = (n - torch.inf, n, n.clone(), n.clone())
        else:
            unit = torch.stack([one.unit for one in found]).amax()
            ratios = [(one.unit / unit).to(n.dtype) for one in found]
            merged = (
                torch.stack([one.lse_all for one in found]).logsumexp(0),
                *(
                    sum((getattr(one, name) * ratio for one, ratio in zip(found, ratios, strict=True)), n)
                    for name in ("sum_pos", "num_pos")
                ),
                sum((one.size for one in found), n),
            )
        ctx.call = call
        ctx.save_for_backward(merged[0], unit, rows, anchors, own, scale)
        ctx.mark_non_differentiable(merged[3])
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        work = partial(_RingStats.gradients, ctx)
        return None, *once_differentiable("contrastive_stats", work, *grads[:3], *ctx.saved_tensors)

    @staticmethod
    @uncompiled
    def gradients(ctx: Any, of_lse: Tensor, of_sum: Tensor, of_num: Tensor, *saved: Tensor) -> tuple[Any, ...]:
        lse, unit, rows, *tensors = saved
        call, totals = ctx.call, [torch.zeros_like(tensor) for tensor in tensors]

        def visit(place: Place, block: Tensor | None) -> Tensor | None:
            if block is None or not len(block):
                return None
            leaves = [tensor.detach().requires_grad_() for tensor in (block, *tensors)]
            with torch.enable_grad():
                found = _over_block(call, leaves[0], place, *leaves[1:])
            share = torch.where(found.lse_all == -torch.inf, 0, (found.lse_all.detach() - lse).exp())
            ratio = (found.unit / unit).to(lse.dtype)
            grads = (of_lse * share, of_sum * ratio, of_num * ratio)
            of_block, *others = torch.autograd.grad(found[:3], leaves, grads, allow_unused=True)
            for total, part in zip(totals, others, strict=True):
                if part is not None:
                    total.add_(part)
            return of_block

        need = ctx.needs_input_grad
        home = call.exchange.walk_back(None, rows, False, visit, rows.dtype if need[1] else None)
        return home, *(total if needed else None for total, needed in zip(totals, need[2:], strict=True))


def _over_block(call: _Call, block: Tensor, place: Place, anchors: Tensor, own: Tensor, scale: Tensor) -> _Swept:
    values, theirs, bias = block.split([call.width, block.shape[1] - call.width - call.has_bias, int(call.has_bias)], 1)
    others = Rows(
        values,
        None,
        None if call.ids is None else call.ids[place],
        bias[:, 0] if call.has_bias else None,
        theirs,
        normalize=call.normalize,
    )
    mine = call.problem.anchors._replace(values=anchors, assignments=own)
    problem = replace(call.problem, anchors=mine, contrasts=others, logit_scale=scale, both=False)
    found = statistics(problem, quotients=True)[0]
    assert found.lse_all is not None
    assert found.sum_pos is not None
    size = (found.num_pos + found.num_neg).detach()
    return _Swept(found.lse_all, found.sum_pos, found.num_pos, size, at_unit(theirs.detach())[1])


def assigned_statistics(by_row: Gathered, by_contrast: Gathered, p: Problem, own: Tensor) -> ContrastiveStats:
    """`statistics` with assignments, which have gradients too, so that sums of weights do.

    by_row, by_contrast: exchange the rows of anchors and of contrasts. They are gathered and swept as one set, or swept
    block by block as they travel along a ring.
    """
    dtype = p.dtype  # of the sums: gradients are then added before they are rounded
    anchors, own = p.anchors.values.to(dtype), own.to(dtype)
    contrasts = anchors if p.contrasts is None else p.contrasts.values.to(dtype)
    theirs = own if p.contrasts is None or p.others.assignments is None else p.others.assignments.to(dtype)
    bias = None if p.others.bias is None else p.others.bias.to(dtype)
    ids, contrast_ids = p.anchors.ids, p.others.ids
    if p.contrasts is None:  # ids leave out the row itself
        places = torch.arange(by_row.total, device=anchors.device)
        ids = contrast_ids = places[by_row.own]
    normalize = p.anchors.normalize
    left = Rows(anchors, None, ids, None, own, normalize=normalize)
    found = _one_way(by_contrast, p, left, Rows(contrasts, None, contrast_ids, bias, theirs, normalize=normalize))
    if not p.both:
        return found
    # In the reverse direction the bias adds the same number to all logits of a contrast, and cancels in a loss of
    # assignments. Only a bias of -inf matters: it leaves the contrast out.
    if p.others.bias is not None:
        left_out = (p.others.bias == -torch.inf)[:, None]
        contrasts, theirs = contrasts.masked_fill(left_out, 0), theirs.masked_fill(left_out, 0)
    right = Rows(contrasts, None, p.others.ids, None, theirs, normalize=p.others.normalize)
    return replace(found, reverse=_one_way(by_row, p, right, left._replace(ids=p.anchors.ids)))


def _one_way(exchange: Gathered, p: Problem, anchors: Rows, contrasts: Rows) -> ContrastiveStats:
    """The anchors over the contrasts of all processes. contrasts: those of this process."""
    ids = None if contrasts.ids is None else exchange.spread(contrasts.ids)
    assert contrasts.assignments is not None
    assert anchors.assignments is not None
    if isinstance(exchange, Ring):
        sent = [contrasts.values, contrasts.assignments]
        if contrasts.bias is not None:
            sent.append(contrasts.bias[:, None])
        width, has_bias = contrasts.values.shape[1], contrasts.bias is not None
        call = _Call(exchange, replace(p, anchors=anchors), ids, width, has_bias, contrasts.normalize)
        tensors = torch.cat(sent, 1), anchors.values, anchors.assignments, p.logit_scale
        lse, sums, num_pos, size = _RingStats.apply(call, *tensors)
        return ContrastiveStats(num_pos, size - num_pos, lse_all=lse, sum_pos=sums)

    def of_all(values: Tensor) -> Tensor:
        found: Tensor = _AllRows.apply(exchange, values)
        return found

    others = Rows(
        of_all(contrasts.values),
        None,
        ids,
        None if contrasts.bias is None else of_all(contrasts.bias),
        of_all(contrasts.assignments),
        normalize=contrasts.normalize,
    )
    return statistics(replace(p, anchors=anchors, contrasts=others, both=False), quotients=True)[0]
