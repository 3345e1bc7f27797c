"""The mean loss over blocks of contrasts, with few exchanges between processes: a small batch waits for each of them.

Every process merges the statistics of all contrasts, so it knows the divisors of the means, and the derivatives of all
fields up to the factors that the processes' losses are multiplied by.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...checks import values_visible
from ..library import once_differentiable, uncompiled, without_autocast
from .blocks import Blocks, Call
from .direct import derivative, rows_of, terms_of
from .records import OF_ROWS, TENSORS, Needs, Problem, Rows, Side, gradient_places


def sent_bytes(call: Call, p: Problem) -> int:
    """What each process sends to all others in the forward, besides its rows. 0 with one direction."""
    width = Blocks.layout_of(call, p).width if p.both else 0
    return width * call.exchange.total * p.dtype.itemsize


class BlockMean(torch.autograd.Function):
    """`DirectMean` of the rows of all processes: this process's share, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arguments: Any) -> Tensor:
        """arguments: as those of `BlockStats`."""
        blocks = Blocks(call, arguments)
        with without_autocast(blocks.base.device):
            loss, derivatives = _forward(blocks)
        ctx.save_for_backward(*arguments[:TENSORS], *arguments[-OF_ROWS:], *derivatives)
        ctx.call, ctx.options, ctx.kept = call, arguments[TENSORS:-OF_ROWS], blocks.kept
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work = partial(BlockMean.gradients, ctx)
        found: tuple[Tensor | None, ...] = once_differentiable("contrastive_stats", work, grad, *ctx.saved_tensors)
        return found

    @staticmethod
    @uncompiled
    def gradients(ctx: Any, grad: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs. saved: what the forward saved."""
        count = TENSORS + OF_ROWS
        arguments = (*saved[:TENSORS], *ctx.options, *saved[TENSORS:count])
        blocks = Blocks(ctx.call, arguments)
        blocks.kept = ctx.kept
        needed = ctx.needs_input_grad[1:]
        places = gradient_places(arguments)
        stored_bias = len(arguments) - OF_ROWS + Rows._fields.index("bias")
        with without_autocast(blocks.base.device):
            found, of_stored_bias = _backward(
                blocks, grad, saved[count:], Needs(*(needed[place] for place in places)), needed[stored_bias]
            )
        return None, *blocks.by_argument(arguments, found, needed, of_stored_bias)


def _forward(blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the derivatives of each side's fields: the anchors', and with `both` those of all contrasts."""
    base, exchange = blocks.base, blocks.exchange
    found, of_contrasts, _ = blocks.sweep()
    sides, rows, terms, totals = [found.anchors], [], [], []

    def evaluate(side: Side) -> Tensor:
        rows.append(rows_of(side, base.want, values_visible(side.counts) and side.counts.shape[1] > 0))
        terms.append(terms_of(side, rows[-1]))
        return _mass(terms[-1], rows[-1].counted)

    numbers = evaluate(found.anchors).reshape(1).view(base.dtype)
    everyone = exchange.everyone(torch.cat((of_contrasts.flatten(), numbers)))
    totals.append(everyone[:, -len(numbers) :].contiguous().view(torch.float64).sum())
    if base.both:
        packed = everyone[:, : -len(numbers)].unflatten(1, of_contrasts.shape)
        merged = blocks.layout.merge(packed.double(), blocks.backend)
        sides.append(blocks.layout.side(merged, base.dtype)[0])
        blocks.kept = blocks.kept._replace(contrasts=merged.to(base.dtype))
        totals.append(evaluate(sides[1]))
    own = slice(None), exchange.own
    loss, derivatives = base.logit_scale.new_zeros(()), []
    for side, of_side, values, total, place in zip(sides, rows, terms, totals, own, strict=False):
        weight = (exchange.processes / (total.clamp(min=1) * len(sides))).to(base.dtype)
        if of_side.counted is not None:
            values, weight = torch.where(of_side.counted, values, 0), weight * of_side.counted
        loss += (values * weight)[place].sum()
        derivatives.append(derivative(side.counts, of_side, weight))
    return loss, derivatives


def _mass(terms: Tensor, counted: Tensor | None) -> Tensor:
    """[], float64: the number of rows that count; NaN if the term of one of them is not finite."""
    if counted is None:
        return (terms * 0).sum().double() + len(terms)
    return torch.where(counted, terms * 0, 0).sum().double() + counted.sum()


def _backward(blocks: Blocks, grad: Tensor, derivatives: Any, own: Needs, stored_bias: bool) -> Any:
    base, exchange = blocks.base, blocks.exchange
    walk = partial(exchange.gradients, blocks.kept.rows, blocks.alone)

    def turn(factor: Tensor, factors: Tensor) -> Any:
        """The gradients, and the factors of all processes.

        factor: what this process's loss is multiplied by. factors: the same of the contrasts' owners, [] or [M].
        """
        of_anchors = derivatives[0] * factor
        of_contrasts = derivatives[1] * factors if base.both else of_anchors[..., :0]
        swept, of_bias = blocks.sweep_back(walk, of_anchors, of_contrasts, blocks.kept.contrasts, own, stored_bias)
        parts = [part for part in (swept.contrasts, swept.bias) if part is not None]
        sums, found = exchange.summed_with(parts, factor) if parts or base.both else ([], factor)
        summed = iter(sums)
        swept = swept._replace(
            contrasts=None if swept.contrasts is None else next(summed),
            bias=None if swept.bias is None else next(summed),
        )
        return blocks.finished(swept, of_anchors, own), of_bias, found

    factor = grad.to(base.dtype)
    found, of_bias, factors = turn(factor, factor)
    if base.both and not bool((factors == factors[0]).all()):
        lengths = torch.tensor([place.stop - place.start for place in exchange.places], device=grad.device)
        found, of_bias, _ = turn(factor, factors.repeat_interleave(lengths))
    return found, of_bias
