"""The operator of the contrastive statistics: schema, shapes for tracing, derivatives, and the backends that have it.

It is registered with `torch.library` as an opaque operator, so that torch.compile sees one node; the derivative is an
operator of its own whose derivative raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..library import LIBRARY, intercepted, register, without_autocast
from . import chunked, cpu, cuda, paired, reference, triton
from .observed import NAMES as OBSERVED
from .records import Gradients, Needs, Problem, Side, Statistics

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}

_PROBLEM = (
    "Tensor anchors, Tensor? contrasts, Tensor? paired, Tensor? anchor_clusters, Tensor? contrast_clusters, "
    "Tensor logit_scale, Tensor? contrast_bias, Tensor? anchor_ids, Tensor? contrast_ids, bool normalize_anchors, "
    "bool normalize_contrasts, str[] want, bool both, bool anchors_only, bool observe, str backend"
)
TENSORS, WANT, BOTH = 9, 11, 12  # leading tensor arguments; the places of `want` and `both`
DIFFERENTIABLE = {"anchors": 0, "contrasts": 1, "logit_scale": 5, "contrast_bias": 6, "paired": 2}  # as in Needs
_PROBLEM_LENGTH = _PROBLEM.count(",") + 1
LIBRARY.define(
    f"contrastive_stats_fwd({_PROBLEM}) -> (Tensor fields, Tensor counts, Tensor parts, Tensor contrast_fields, "
    "Tensor contrast_counts, Tensor contrast_parts, Tensor anchor_inverse_norms, Tensor contrast_inverse_norms, "
    "Tensor saved, Tensor observed)"
)
LIBRARY.define(
    f"contrastive_stats_bwd({_PROBLEM}, Tensor counts, Tensor parts, Tensor contrast_counts, Tensor contrast_parts, "
    "Tensor anchor_inverse_norms, Tensor contrast_inverse_norms, Tensor saved, Tensor grad_fields, "
    "Tensor grad_contrast_fields, "
    "bool[] needs) -> (Tensor anchors, Tensor contrasts, Tensor logit_scale, Tensor contrast_bias, Tensor paired)"
)
forward_op = torch.ops.fastcl.contrastive_stats_fwd
backward_op = torch.ops.fastcl.contrastive_stats_bwd


def posed(args: Sequence[Any]) -> tuple[Problem, ModuleType]:
    """The problem that the forward operator's arguments describe, and the backend that they name."""
    *problem, backend = args
    return Problem(*problem), BACKENDS[backend]


def statistics(problem: Problem, backend: ModuleType) -> Statistics:
    with without_autocast(problem.device):
        return paired.join(problem, backend.forward(problem))


def gradients(
    problem: Problem, backend: ModuleType, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs
) -> Gradients:
    """From the gradients [W, S, N] and [W, S, M] of the fields."""
    with without_autocast(problem.device):
        swept = backend.backward(problem, saved, grad, grad_contrasts, needs)
        return paired.add_gradients(problem, saved, grad, needs, swept)


def run_forward(*args: Any) -> tuple[Tensor, ...]:
    problem, backend = posed(args)
    found = statistics(problem, backend)
    return *as_outputs(found), observed_by(problem, found)


def as_outputs(found: Statistics) -> tuple[Tensor, ...]:
    """What the backward is given again, in the order of the forward operator's outputs."""
    return *found.anchors[:3], *found.contrasts[:3], *found[2:]


def observed_by(problem: Problem, found: Statistics) -> Tensor:
    """`Side.observed` of the anchors [10, S, N]; with `both`, the contrasts' behind it: [10, S, N + M]. Or empty."""
    sides = [side.observed for side in (found.anchors, found.contrasts) if side.observed is not None]
    if not sides:
        return problem.logit_scale.new_empty(0)
    return torch.cat(sides, -1) if problem.both else sides[0]


def run_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The gradients that the backward operator returns, in the order of `Needs`; None where not needed."""
    counts, parts, contrast_counts, contrast_parts, *others, grad, grad_contrasts, flags = args[_PROBLEM_LENGTH:]
    needs = Needs(*flags)
    saved = Statistics(Side(grad, counts, parts), Side(grad_contrasts, contrast_counts, contrast_parts), *others)
    found = gradients(*posed(args[:_PROBLEM_LENGTH]), saved, grad, grad_contrasts, needs)
    return tuple(
        None if gradient is None or not need or args[source] is None else gradient.to(args[source].dtype).contiguous()
        for need, gradient, source in zip(needs, found, DIFFERENTIABLE.values(), strict=True)
    )


def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    nothing = args[5].new_empty  # an output each: an operator's outputs must not share memory
    return tuple(nothing(0) if gradient is None else gradient for gradient in run_backward(*args))


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, backend = posed(args)
    s, n, m = problem.sizes
    new = problem.logit_scale.new_empty

    def side(size: int) -> tuple[Tensor, ...]:
        return (
            new((len(problem.want), s, size)),
            new((2, size)),
            new((2, len(problem.log_sums), s, size)),
        )

    a = new(n if problem.normalize_anchors else 0)
    c = new(m if problem.normalize_contrasts and problem.contrasts is not None else 0)
    observed = new(len(OBSERVED), s, n + m if problem.both else n) if problem.observe else new(0)
    return *side(n), *side(m if problem.both else 0), a, c, new(backend.saved_size(problem)), observed


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, _ = posed(args[:_PROBLEM_LENGTH])
    sources = [args[i] for i in DIFFERENTIABLE.values()]
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
    """Keeps what the backward needs of `as_outputs`, and returns that."""
    saved = of_backward(outputs)
    ctx.set_materialize_grads(False)  # zeros for every output, saved ones too, cost more than small kernels
    ctx.save_for_backward(*args[:TENSORS], *saved)
    ctx.options = args[TENSORS:]
    return saved


def of_backward(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of `as_outputs`, all but the fields."""
    _, counts, parts, _, contrast_counts, contrast_parts, *others = outputs
    return counts, parts, contrast_counts, contrast_parts, *others


def differentiate(ctx: Any, grad: Tensor | None, grad_contrasts: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments from those of the fields [W, S, N] of both sides; None: zeros."""
    needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE.values()]
    return differentiate_saved(ctx.saved_tensors, ctx.options, needs, grad, grad_contrasts)


def differentiate_saved(
    saved: Sequence[Any], options: Sequence[Any], needs: list[bool], grad: Tensor | None, grad_contrasts: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same of what `save` has kept, which may be asked for only once."""
    counts, parts, contrast_counts = saved[TENSORS : TENSORS + 3]
    shape = len(options[WANT - TENSORS]), parts.shape[2]
    grad = counts.new_zeros(*shape, counts.shape[1]) if grad is None else grad.to(counts.dtype)
    if grad_contrasts is None:
        grad_contrasts = counts.new_zeros(*shape, contrast_counts.shape[1])
    grad_contrasts = grad_contrasts.to(counts.dtype)
    arguments = (*saved[:TENSORS], *options, *saved[TENSORS:], grad, grad_contrasts, needs)
    # With gradients on, somebody wants to differentiate this: the operator will tell that it cannot be done.
    plain = not torch.is_grad_enabled() and not intercepted(saved[0], grad, grad_contrasts)
    results = (run_backward if plain else backward_op)(*arguments)
    return by_argument([gradient if need else None for need, gradient in zip(needs, results, strict=True)])


def by_argument(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """In the order of the operator's arguments, those in the order of `Needs`."""
    result: list[Tensor | None] = [None] * _PROBLEM_LENGTH
    for i, gradient in zip(DIFFERENTIABLE.values(), gradients, strict=True):
        result[i] = gradient
    return tuple(result)


register(
    "contrastive_stats",
    _ContrastiveStats,
    (run_forward, _forward_fake),
    (_backward_impl, _backward_fake),
    "contrastive_stats",
)
