"""The operator of the contrastive statistics: schema, shapes for tracing, derivative, table of backends.

It is registered with `torch.library` as an opaque operator, so torch.compile sees one node. The derivative is a second
operator, whose own derivative raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import LIBRARY, intercepted, register, without_autocast
from . import chunked, cpu, cuda, infinite, linear, one_way, own_contrasts, reference, triton
from .backend import Backend
from .observed import PARTS
from .records import (
    ARGUMENTS,
    PLACES,
    SCHEMA,
    TENSORS,
    Gradients,
    Needs,
    Problem,
    Side,
    Statistics,
    gradient_places,
    unflatten,
)
from .triton import positives

BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}

_LENGTH = len(ARGUMENTS) + 1  # the last argument is the backend's name
_KEPT = (
    "Tensor counts, Tensor parts, Tensor contrast_counts, Tensor contrast_parts, Tensor anchor_inverse_norms, "
    "Tensor contrast_inverse_norms, Tensor saved"
)
LIBRARY.define(
    f"contrastive_stats_fwd({SCHEMA}, str backend) -> (Tensor fields, Tensor counts, Tensor parts, "
    "Tensor contrast_fields, Tensor contrast_counts, Tensor contrast_parts, Tensor anchor_inverse_norms, "
    "Tensor contrast_inverse_norms, Tensor saved, Tensor observed)"
)
LIBRARY.define(
    f"contrastive_stats_bwd({SCHEMA}, str backend, {_KEPT}, Tensor grad_fields, Tensor grad_contrast_fields, "
    f"bool[] needs) -> ({', '.join(f'Tensor {name}' for name in Gradients._fields)})"
)
forward_op = torch.ops.fastcl.contrastive_stats_fwd
backward_op = torch.ops.fastcl.contrastive_stats_bwd


def parsed(args: Sequence[Any]) -> tuple[Problem, Backend]:
    """The problem and the backend, from the arguments of the forward operator."""
    return unflatten(args[:-1]), BACKENDS[args[-1]]


def statistics(problem: Problem, backend: Backend) -> Statistics:
    """All wanted statistics."""
    with without_autocast(problem.device):
        swept = swept_statistics(problem, backend)
        join = positives.join if _by_kernels(problem, backend) else own_contrasts.join
        return join(problem, swept)


def gradients(
    problem: Problem, backend: Backend, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs
) -> Gradients:
    """The needed gradients, from those of the fields: `grad` [W, S, N], `grad_contrasts` [W, S, M]."""
    with without_autocast(problem.device):
        swept = swept_gradients(problem, backend, saved, grad, grad_contrasts, needs)
        add = positives.add_gradients if _by_kernels(problem, backend) else own_contrasts.add_gradients
        return add(problem, saved, grad, needs, swept)


def _by_kernels(problem: Problem, backend: Backend) -> bool:
    """Whether Triton kernels compute the anchors' own contrasts."""
    return backend is triton and positives.takes(problem)


def swept_statistics(problem: Problem, backend: Backend) -> Statistics:
    """All wanted fields, without the anchors' own contrasts."""
    if backend not in (cpu, triton) or linear.FIELD in problem.want:  # these two know infinite rows themselves
        problem = infinite.as_nan(problem)
    return linear.add(problem, one_way.forward(_swept(problem, backend), backend))


def swept_gradients(
    problem: Problem, backend: Backend, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs
) -> Gradients:
    """Gradients of all wanted fields, without the anchors' own contrasts."""
    of_sides = linear.swept_gradient(problem, grad), linear.swept_gradient(problem, grad_contrasts)
    found = one_way.backward(_swept(problem, backend), backend, saved, *of_sides, needs)
    return linear.add_gradients(problem, saved, grad, grad_contrasts, needs, found)


def _swept(problem: Problem, backend: Backend) -> Problem:
    """The problem that the backend sweeps.

    Kernels round the gradient of a tile to half-precision rows. What `linear` adds after it would not cancel that
    rounding, so these rows are swept in float32.
    """
    swept = linear.without(problem)
    if swept is problem or backend is reference or backend is chunked:  # these two are in float32 anyway
        return swept
    return linear.in_float32(swept)


def run_forward(*args: Any) -> tuple[Tensor, ...]:
    problem, backend = parsed(args)
    found = statistics(problem, backend)
    return *as_outputs(found), observed_by(problem, found)


def as_outputs(found: Statistics) -> tuple[Tensor, ...]:
    """The outputs of the forward operator, without `observed`."""
    return *found.anchors[:3], *found.contrasts[:3], *found[2:]


def observed_by(problem: Problem, found: Statistics) -> Tensor:
    """`Side.observed` of the anchors [10, S, N]; with `both`, of both sides [10, S, N + M]; without `observe` [0]."""
    sides = [side.observed for side in (found.anchors, found.contrasts) if side.observed is not None]
    if not sides:
        return problem.logit_scale.new_empty(0)
    return torch.cat(sides, -1) if problem.both else sides[0]


def run_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The outputs of the backward operator, in the order of `Needs`; None for gradients that are not needed."""
    counts, parts, contrast_counts, contrast_parts, *others, grad, grad_contrasts, flags = args[_LENGTH:]
    needs = Needs(*flags)
    saved = Statistics(Side(grad, counts, parts), Side(grad_contrasts, contrast_counts, contrast_parts), *others)
    found = gradients(*parsed(args[:_LENGTH]), saved, grad, grad_contrasts, needs)
    sources = [args[place] for place in gradient_places(args)]
    return tuple(
        None if gradient is None or not need or source is None else gradient.to(source.dtype).contiguous()
        for need, gradient, source in zip(needs, found, sources, strict=True)
    )


def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    nothing = args[PLACES["logit_scale"]].new_empty  # called for each output, as outputs must not share memory
    return tuple(nothing(0) if gradient is None else gradient for gradient in run_backward(*args))


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, backend = parsed(args)
    s, n, m = problem.sizes
    new = problem.logit_scale.new_empty

    def side(size: int) -> tuple[Tensor, ...]:
        return (
            new((len(problem.want), s, size)),
            new((2, size)),
            new((2, len(problem.log_sums), s, size)),
        )

    a = new(n if problem.anchors.normalize else 0)
    c = new(m if problem.contrasts is not None and problem.contrasts.normalize else 0)
    observed = new(len(PARTS), s, n + m if problem.both else n) if problem.observe else new(0)
    return (
        *side(n),
        *side(m if problem.both else 0),
        a,
        c,
        new(one_way.saved_size(_swept(problem, backend), backend)),
        observed,
    )


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, _ = parsed(args[:_LENGTH])
    sources = [args[place] for place in gradient_places(args)]
    return tuple(
        source.new_empty(source.shape) if need and source is not None else problem.logit_scale.new_empty(0)
        for need, source in zip(args[-1], sources, strict=True)
    )


class _ContrastiveStats(torch.autograd.Function):
    """The operator's derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = forward_op(*args)
        ctx.mark_non_differentiable(*save(ctx, args, outputs[:-1]), outputs[-1])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return differentiate(ctx, grads[0], grads[3])


def save(ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Saves the arguments and the outputs that the backward needs; returns these outputs."""
    saved = of_backward(outputs)
    ctx.set_materialize_grads(False)  # zeros for all outputs would cost more than a small sweep
    ctx.save_for_backward(*args[:TENSORS], *saved)
    ctx.options = args[TENSORS:]
    return saved


def of_backward(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs that the backward needs: all of `as_outputs` but the fields."""
    _, counts, parts, _, contrast_counts, contrast_parts, *others = outputs
    return counts, parts, contrast_counts, contrast_parts, *others


def differentiate(ctx: Any, grad: Tensor | None, grad_contrasts: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments, from those of the fields of both sides, [W, S, N] and [W, S, M]; None means zeros."""
    saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in gradient_places(saved)]
    return differentiate_saved(saved, ctx.options, needs, grad, grad_contrasts)


def differentiate_saved(
    saved: Sequence[Any], options: Sequence[Any], needs: list[bool], grad: Tensor | None, grad_contrasts: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`differentiate` without a context: `saved` and `options` are what `save` stored."""
    counts, parts, contrast_counts = saved[TENSORS : TENSORS + 3]
    shape = len(options[PLACES["want"] - TENSORS]), parts.shape[2]
    grad = counts.new_zeros(*shape, counts.shape[1]) if grad is None else grad.to(counts.dtype)
    if grad_contrasts is None:
        grad_contrasts = counts.new_zeros(*shape, contrast_counts.shape[1])
    grad_contrasts = grad_contrasts.to(counts.dtype)
    arguments = (*saved[:TENSORS], *options, *saved[TENSORS:], grad, grad_contrasts, needs)
    # With gradients enabled a second derivative may follow. The operator makes it raise; `run_backward` cannot.
    plain = not torch.is_grad_enabled() and not intercepted(saved[0], grad, grad_contrasts)
    results = (run_backward if plain else backward_op)(*arguments)
    return by_argument(saved, [gradient if need else None for need, gradient in zip(needs, results, strict=True)])


def by_argument(arguments: Sequence[Any], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Reorders gradients from the order of `Gradients` to that of the operator's arguments.

    arguments: at least the tensors among the arguments.
    """
    result: list[Tensor | None] = [None] * _LENGTH
    for place, gradient in zip(gradient_places(arguments), gradients, strict=True):
        result[place] = gradient
    return tuple(result)


register(
    "contrastive_stats",
    _ContrastiveStats,
    (run_forward, _forward_fake),
    (_backward_impl, _backward_fake),
    "contrastive_stats",
)
