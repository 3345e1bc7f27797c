"""Sums over pairs with the rows of all processes, for losses with `gather`.

Sums over blocks of contrasts are added, and so are gradients. A total whose weights are known takes one turn, in which
the gradient of a block of contrasts travels with the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import World
from ..ops.contrastive.blocks import Place, data_of_all
from ..ops.contrastive.records import Rows
from ..ops.library import once_differentiable, uncompiled
from ..ops.pairs.op import sweep, weighted_total
from ..ops.pairs.records import Gradients, Needs, Pairs, Sums
from .gathered import Travelling


class Maps(NamedTuple):
    """The maps of a call, as in `Pairs`."""

    kind: str
    pos_margin: float = 0.0
    neg_margin: float = 0.0
    only_positives: bool = False


@dataclass(frozen=True)
class _Call:
    world: World
    rows: Travelling
    maps: Maps


class _Data(NamedTuple):
    """The tensors of a call. All but the last may have a gradient."""

    anchors: Tensor  # [N, D]
    contrasts: Tensor | None  # [m, D], the process's own; None: self-contrast
    scale: Tensor  # []
    offset: Tensor | None  # [] or [N]
    bias: Tensor | None  # [m], of the process's own contrasts
    weights: Tensor  # [2, N]


class _Turn:
    """Visits the contrasts of all processes once, block by block."""

    def __init__(self, call: _Call, data: _Data) -> None:
        self.call, self.data = call, data
        rows, exchange = call.rows, call.rows.exchange
        self.alone = data.contrasts is None
        own = rows.anchors if self.alone or rows.contrasts is None else rows.contrasts
        bias = None if data.bias is None else data.bias.to(data.scale.dtype)
        self.of_all = data_of_all(exchange, own._replace(bias=bias), rows.known)
        self.normalize = own.normalize

    def run(self, weights: Tensor | None, needs: Needs) -> tuple[Sums, Gradients]:
        """The sums of the anchors, and the gradients of the process's own tensors.

        needs: of contrasts and bias the same in all processes.
        """
        call, data = self.call, self.data
        exchange, maps = call.rows.exchange, call.maps
        n, dtype = len(data.anchors), data.scale.dtype
        new = data.scale.new_zeros
        sums = Sums(new(2, n), new(2, n), new(2, n))
        total = Gradients(
            new(data.anchors.shape) if needs.anchors else None,
            None,
            new((), dtype=torch.float64) if needs.logit_scale else None,
            new(data.offset.shape, dtype=torch.float64) if needs.offset and data.offset is not None else None,
            new(exchange.total) if needs.bias and data.bias is not None else None,
        )
        anchors = call.rows.anchors._replace(values=data.anchors, bias=None)

        def visit(place: Place, block: Tensor | None) -> Tensor | None:
            contrasts = None
            if block is not None:
                here = {name: values[place] for name, values in self.of_all.items()}
                contrasts = Rows(block, normalize=self.normalize, **here)
            p = Pairs(anchors, contrasts, data.scale, data.offset, *maps)
            of_block = needs._replace(contrasts=needs.contrasts and block is not None)
            found, gradients = sweep(p, call.rows.backend, weights, of_block)
            for mine, part in zip(sums, found, strict=True):
                mine.add_(part)
            for name in ("anchors", "logit_scale", "offset"):
                mine, part = getattr(total, name), getattr(gradients, name)
                if mine is not None and part is not None:
                    mine.add_(part)
            if total.bias is not None and gradients.bias is not None:
                total.bias[place] = gradients.bias
            return gradients.contrasts

        rows = data.anchors if data.contrasts is None else data.contrasts
        if weights is None:
            exchange.walk(rows, self.alone, visit)
            return sums, Gradients()
        home = exchange.once(rows, self.alone, visit, dtype if needs.contrasts else None)
        if home is not None and self.alone:
            if total.anchors is not None:
                total.anchors.add_(home)
            home = None
        bias = None if total.bias is None else exchange.summed(total.bias)
        return sums, total._replace(contrasts=home, bias=bias)


class _GatheredSums(torch.autograd.Function):
    """The sums of the anchors over the travelling contrasts. Their gradient takes another turn."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        data = _Data(*tensors)  # type: ignore[arg-type]
        sums, _ = _Turn(call, data).run(None, Needs())
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(sums.active, sums.counts)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        work = partial(_GatheredSums.gradients, ctx)
        found: tuple[Tensor | None, ...] = once_differentiable("contrastive_stats", work, grad, *ctx.saved_tensors)
        return None, *found, None

    @staticmethod
    @uncompiled
    def gradients(ctx: Any, grad: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return _second_turn(ctx.call, _Data(*tensors), grad.contiguous(), ctx.needs_input_grad[1:])  # type: ignore[arg-type]


class _GatheredTotal(torch.autograd.Function):
    """``sum(weights * values)`` and the sums, in one turn with the gradient.

    Gradients of the contrasts are sums over processes, taken before the incoming gradients are known. They are right if
    all processes have the same incoming gradient, which the backward compares; else it takes another turn.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        data = _Data(*tensors)  # type: ignore[arg-type]
        needs = _needs(call, data, ctx.needs_input_grad[1:])
        weights = data.weights.contiguous()
        sums, found = _Turn(call, data).run(weights if any(needs) else None, needs)
        total = weighted_total(weights, sums)
        ctx.call = call
        ctx.save_for_backward(sums.values, *found, *tensors)
        ctx.mark_non_differentiable(*sums)
        ctx.set_materialize_grads(False)
        return total, *sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad = saved[0].new_zeros(()) if grad is None else grad  # the other processes wait for this one
        work = partial(_GatheredTotal.gradients, ctx)
        return None, *once_differentiable("contrastive_stats", work, grad, *saved)

    @staticmethod
    @uncompiled
    def gradients(ctx: Any, grad: Tensor, values: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(Gradients._fields)
        found, tensors, flags = Gradients(*saved[:count]), saved[count:], ctx.needs_input_grad[1:]
        of_weights = values * grad if flags[-1] else None
        world: World = ctx.call.world
        everyone = world.all_rows(grad.reshape(1), [1] * world.size)
        if not bool((everyone == grad).all()) and not bool(everyone.isnan().any()):
            data = _Data(*tensors)  # type: ignore[arg-type]
            return *_second_turn(ctx.call, data, data.weights * grad, flags), of_weights
        scaled = [None if gradient is None else gradient * grad for gradient in found]
        return *_of_dtypes(scaled, tensors, flags), of_weights


def _needs(call: _Call, data: _Data, flags: Sequence[bool]) -> Needs:
    """What a turn computes. The collectives of contrasts and bias need all processes to agree."""
    anchors, _, scale, offset, *_ = flags
    travelling = "anchors" if data.contrasts is None else "contrasts"
    return Needs(
        anchors, call.rows.needs[travelling], scale, offset, data.bias is not None and call.rows.needs["contrast_bias"]
    )


def _second_turn(call: _Call, data: _Data, weights: Tensor, flags: Sequence[bool]) -> tuple[Tensor | None, ...]:
    _, found = _Turn(call, data).run(weights, _needs(call, data, flags))
    return _of_dtypes(found, data, flags)


def _of_dtypes(
    found: Sequence[Tensor | None], sources: Sequence[Tensor | None], flags: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    return tuple(
        None if gradient is None or source is None or not need else gradient.to(source.dtype)
        for gradient, source, need in zip(found, sources, flags, strict=False)
    )


def _arguments(world: World, rows: Travelling, scale: Tensor, offset: Tensor | None, maps: Maps) -> tuple[Any, ...]:
    contrasts = rows.contrasts
    return (
        _Call(world, rows, maps), rows.anchors.values, None if contrasts is None else contrasts.values, scale, offset,
        None if contrasts is None else contrasts.bias,
    )  # fmt: skip


def gathered_sums(world: World, rows: Travelling, scale: Tensor, offset: Tensor | None, maps: Maps) -> Sums:
    """The sums of this process's anchors over the travelling contrasts; the values are differentiable."""
    weights = scale.new_empty(2, 0)
    return Sums(*_GatheredSums.apply(*_arguments(world, rows, scale, offset, maps), weights))


def gathered_total(
    world: World, rows: Travelling, scale: Tensor, offset: Tensor | None, maps: Maps, weights: Tensor
) -> tuple[Tensor, Sums]:
    """``sum(weights * values)`` of this process's anchors, differentiable, and the detached sums."""
    call, *tensors = _arguments(world, rows, scale, offset, maps)
    if not torch.is_grad_enabled():  # inside a function of autograd the mode is not visible
        data = _Data(*tensors, weights)  # type: ignore[call-arg]
        sums, _ = _Turn(call, data).run(None, Needs())
        return weighted_total(weights, sums), sums
    total, *found = _GatheredTotal.apply(call, *tensors, weights)
    return total, Sums(*found)
