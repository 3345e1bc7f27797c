"""Sinkhorn's operators: schemas, shapes for tracing, derivatives, and the table of backends.

As for the contrastive statistics, the operators are opaque to torch.compile, and a second derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..backends.choose import choose_backend
from ..library import LIBRARY, intercepted, register, without_autocast
from . import chunked, cpu, cuda, reference, triton
from .solver import Incoming, Kept, Needs, Passes, Problem, differentiate, named, solve

PASSES: dict[str, Passes] = {"reference": reference, "chunked": chunked, "cpu": cpu, "triton": triton, "cuda": cuda}

_ARGUMENTS = (
    "Tensor scores, Tensor epsilon, Tensor log_prior, Tensor log_row_marginal, Tensor? init, int n_iters, float? tol, "
    "str group, str backend"
)
_TENSORS, _LENGTH = 5, _ARGUMENTS.count(",") + 1
_DIFFERENTIABLE = 4  # leading arguments, as in Needs
LIBRARY.define(
    f"sinkhorn_fwd({_ARGUMENTS}) -> (Tensor assignments, Tensor row_potential, Tensor col_potential, Tensor error, "
    "Tensor n_iters, Tensor kept_rows, Tensor kept_columns)"
)
LIBRARY.define(
    f"sinkhorn_bwd({_ARGUMENTS}, Tensor error, Tensor kept_rows, Tensor kept_columns, Tensor? grad_assignments, "
    "Tensor grad_row_potential, Tensor grad_col_potential, bool[] needs) -> (Tensor scores, Tensor epsilon, "
    "Tensor log_prior, Tensor log_row_marginal)"
)
_forward = torch.ops.fastcl.sinkhorn_fwd
_backward = torch.ops.fastcl.sinkhorn_bwd


def _forward_impl(*args: Any, out: Tensor | None = None) -> tuple[Tensor, ...]:
    *problem, backend = args
    p = Problem(*problem)
    with without_autocast(p.scores.device):
        *outputs, kept = solve(PASSES[backend], p, out)
    return *outputs, *kept


def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    *problem, backend = args[:_LENGTH]
    error, kept_rows, kept_columns, *grads, flags = args[_LENGTH:]
    p = Problem(*problem)
    with without_autocast(p.scores.device):
        gradients = differentiate(
            PASSES[backend], p, Kept(kept_rows, kept_columns), error, Incoming(*grads), Needs(*flags)
        )
    return tuple(
        gradient.contiguous() if need and gradient is not None else p.epsilon.new_empty(0)
        for need, gradient in zip(flags, gradients, strict=True)
    )


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    p = Problem(*args[:-1])
    batch, n, k = p.scores.shape
    new = p.epsilon.new_empty
    return (
        p.scores.new_empty(p.scores.shape),
        new(batch, n),
        new(batch, k),
        new(batch),
        p.epsilon.new_empty((), dtype=torch.int64),
        *Kept.like(p),
    )


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    epsilon = args[1]
    return tuple(
        source.new_empty(source.shape) if need else epsilon.new_empty(0)
        for need, source in zip(args[-1], args[:_DIFFERENTIABLE], strict=True)
    )


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = (_forward if intercepted(*args[:_TENSORS]) else _forward_impl)(*args)
        ctx.mark_non_differentiable(*outputs[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_TENSORS], outputs[3], *outputs[5:])
        ctx.options = args[_TENSORS:]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
        assignments, *potentials = grads[:3]
        rows, columns = (
            like.new_zeros(like.shape) if grad is None else grad
            for grad, like in zip(potentials, (saved[3], saved[2]), strict=True)
        )
        results = _backward(*saved[:_TENSORS], *ctx.options, *saved[_TENSORS:], assignments, rows, columns, needs)
        gradients = [result if need else None for need, result in zip(needs, results, strict=True)]
        return *gradients, *[None] * (_LENGTH - _DIFFERENTIABLE)


register("sinkhorn", _Sinkhorn, (_forward_impl, _forward_fake), (_backward_impl, _backward_fake), "sinkhorn")


def sinkhorn(
    scores: Tensor,
    epsilon: Tensor,
    log_prior: Tensor,
    log_row_marginal: Tensor,
    init: Tensor | None,
    n_iters: int,
    tol: float | None,
    group: str,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Assignments [B, N, K], potentials [B, N] and [B, K], error [B], number of iterations [].

    The arguments are those of `Problem`, already checked. out [B, N, K]: becomes the assignments; without a gradient.
    """
    backend = choose_backend(scores.device, epsilon.dtype, "sinkhorn")
    tensors = scores, epsilon, log_prior, log_row_marginal, init
    options = n_iters, tol, group, backend
    run: Callable[..., tuple[Tensor, ...]] = _forward
    if not intercepted(*tensors, out):  # past the dispatcher, which for few scores takes as long as a pass
        if out is not None:
            outputs = _forward_impl(*tensors, *options, out=out)
            torch.autograd.graph.increment_version(out)
            return outputs[:5]
        needed = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        run = _Sinkhorn.apply if needed else _forward_impl
    outputs = run(*tensors, *options)[:5]
    return outputs if out is None else (out.copy_(outputs[0]), *outputs[1:])


class _SumOver(torch.autograd.Function):
    """The sum over the processes of a group. The gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, group: str, values: Tensor) -> Tensor:
        ctx.group = group
        whole = values.contiguous().clone()
        dist.all_reduce(whole, dist.ReduceOp.SUM, named(group))
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _SumOver.apply(ctx.group, grad)


def sum_over(group: str, values: Tensor) -> Tensor:
    found: Tensor = _SumOver.apply(group, values)
    return found
