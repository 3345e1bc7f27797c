"""Bypasses torch's dispatcher when no tracer, mode or transform is active (`library.intercepted`).

For a small batch the dispatcher, the unstacking of outputs and the formula's nodes in autograd's graph would each take
longer than the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import values_visible
from ..backends import cuda_runtime, triton_launch
from ..backends.triton_tape import SEES_HOOKS, Tape, Taped, comparable
from ..library import intercepted, once_differentiable, without_autocast
from . import cpu, cuda, triton
from .backend import Backend
from .fields import LOG_SUMS
from .op import (
    as_outputs,
    by_argument,
    differentiate,
    differentiate_saved,
    forward_op,
    observed_by,
    of_backward,
    parsed,
    run_backward,
    run_forward,
    save,
    statistics,
)
from .records import PLACES, TENSORS, Gradients, Needs, Problem, Side, gradient_places
from .triton import mean as triton_mean

WANT, BOTH = PLACES["want"], PLACES["both"]

TAPED = "cuda"  # the type of the devices on which calls are replayed; in the interpreter it would save nothing

# Up to this N M D the forward computes the gradient as well: a second call would cost more. So it does if one call can
# keep the products of all rows, which two calls compute twice.
AT_ONCE = 1 << 25


class DirectStats(torch.autograd.Function):
    """Returns each statistic as one output, in the order of `taken_apart`, then the observed statistics."""

    @staticmethod
    def forward(ctx: Any, *args_and_options: Any) -> tuple[Tensor, ...]:
        *args, one_scale, exact = args_and_options
        *outputs, observed = run_forward(*args)
        save(ctx, args, outputs)
        values = taken_apart(outputs, one_scale, args[WANT], args[BOTH], exact)
        ctx.mark_non_differentiable(*_counts_among(values, len(args[WANT])), observed)
        return *values, observed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = len(ctx.options[WANT - TENSORS])
        both_sides = stacked(grads[:wanted]), stacked(grads[wanted + 2 : 2 * wanted + 2])
        return *differentiate(ctx, *both_sides), None, None


class DirectMean(torch.autograd.Function):
    """The mean of lse_i - sum_pos_i / num_pos_i over the rows that count, as one node of autograd's graph.

    The problem wants (lse_neg, sum_pos), with lse = lse_neg; or (lse_all, lse_neg, sum_pos), with lse = lse_all:
    lse_neg then serves rows with one positive, whose loss is log(1 + neg / pos). With `both` it is the mean of the
    anchors' and the contrasts' means. Observed statistics are a second output. A row counts if it has a positive and,
    in the first case, a negative.

    The derivatives in the fields depend on the counts and on neg / pos only. The native engine knows both, so it
    computes loss and gradient of a small batch in one call, and the backward only multiplies.
    """

    @staticmethod
    def forward(ctx: Any, *args_and_grad_mode: Any) -> Tensor | tuple[Tensor, Tensor]:
        *args, grad_mode = args_and_grad_mode
        problem, backend = parsed(args)
        ctx.native = backend is cpu and cpu.takes_mean_loss(problem)
        ctx.options = args[TENSORS:]
        ctx.set_materialize_grads(False)
        differentiated = grad_mode and any(ctx.needs_input_grad)
        kept: Sequence[Tensor | None]
        if not ctx.native:
            options = (*hashable(ctx.options), differentiated)
            (loss, observed, *kept), tape = _taped(_FORWARD, problem, backend, options, *args[:TENSORS])
            kept, ctx.tape = comparable(kept, tape)
            assert loss is not None
            ctx.save_for_backward(*args[:TENSORS], *kept)
            return _with(ctx, loss, observed)
        needs = Needs(*[differentiated and ctx.needs_input_grad[place] for place in gradient_places(args)])
        small = problem.anchors.values.numel() * problem.sizes[2] <= AT_ONCE
        ctx.at_once = not differentiated or small or cpu.keeps_products(problem, needs)
        if ctx.at_once:
            loss, kept, observed = cpu.mean_loss(problem, needs)
        else:
            loss, *kept, observed = cpu.mean_forward(problem)
        ctx.save_for_backward(*args[:TENSORS], *kept)  # saved arguments: torch checks that they are unchanged
        return _with(ctx, loss, observed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, options = ctx.saved_tensors, ctx.options  # read once: under checkpointing a second read fails
        needs = [ctx.needs_input_grad[place] for place in gradient_places(saved)]
        if not ctx.native:
            return *derived(saved, options, needs, grad, ctx.tape), None
        if not ctx.at_once and intercepted(saved[0], grad):  # run the operators, which a tracer sees
            with torch.no_grad():
                *outputs, _ = forward_op(*saved[:TENSORS], *options)
            sides = [Side(*outputs[:3]), Side(*outputs[3:6])][: 2 if options[BOTH - TENSORS] else 1]
            rows = [rows_of(side, options[WANT - TENSORS], False) for side in sides]
            derivatives = [_of_mean(side.counts, those, len(sides)) for side, those in zip(sides, rows, strict=True)]
            kept = (*saved[:TENSORS], *of_backward(outputs), *derivatives)
            return *derived(kept, options, needs, grad, None), None
        arguments = (_scaled if ctx.at_once else _gradients, options, needs, grad, *saved)
        return *by_argument(saved, once_differentiable("contrastive_stats", *arguments)), None


def mean_forward(options: Sequence[Any], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The mean, the observed statistics, what the operator's backward needs, and the derivatives of each side's fields.

    options: those of the operator, and whether the derivatives are needed.
    """
    *rest, differentiated = options
    problem, backend = parsed((*tensors, *rest))
    found = statistics(problem, backend)
    sides = [found.anchors, found.contrasts] if problem.both else [found.anchors]
    if backend is triton and max(problem.sizes[1:]) <= triton_mean.MOST_ROWS and problem.dtype == torch.float32:
        loss, derivatives = triton_mean.mean_loss(sides, problem.want)
    else:
        rows = [rows_of(side, problem.want, values_visible(side.counts)) for side in sides]
        means = [_mean(side, those) for side, those in zip(sides, rows, strict=True)]
        loss, derivatives = means[0] if len(means) == 1 else (means[0] + means[1]) / 2, []
        if differentiated:
            derivatives = [_of_mean(side.counts, those, len(sides)) for side, those in zip(sides, rows, strict=True)]
    observed = observed_by(problem, found) if problem.observe else None
    return loss, observed, *of_backward(as_outputs(found)), *derivatives


def mean_backward(options: Sequence[Any], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments, from what `mean_forward` returned and the gradient of the mean.

    options: those of the operator, which gradients are needed, and the forward's tape.
    """
    *rest, needs, tape = options
    *given, grad = tensors
    saved = unpacked(given, tape)
    derivatives = saved[TENSORS + KEPT :]
    assert grad is not None
    times = triton_mean.scaled if rest[-1] == "triton" and grad.dtype == torch.float32 else torch.mul
    of_fields = [times(derivative, grad) for derivative in derivatives if derivative is not None]
    counts, _, contrast_counts = saved[TENSORS : TENSORS + 3]
    assert counts is not None
    assert contrast_counts is not None
    if len(of_fields) == 1:
        of_fields.append(counts.new_zeros(len(rest[WANT - TENSORS]), 1, contrast_counts.shape[1]))
    return run_backward(*saved[:TENSORS], *rest, *saved[TENSORS : TENSORS + KEPT], *of_fields, needs)


KEPT = 7  # number of tensors of `of_backward`
_FORWARD, _BACKWARD = Taped(mean_forward, own=2), Taped(mean_backward, own=len(Gradients._fields))
# A tape keeps all that the forward allocates until the backward; for more numbers of rows than this, that is too much.
# Few anchors may have longer queues: with so few multiplications the host takes longer than the device.
MOST_ON_TAPE, MOST_OF_QUEUES, FEW_PRODUCTS = 1 << 22, 1 << 24, 1 << 33


# By backend: what a tape depends on, and the stream; None: no tape may be used.
TAPE_SETTINGS: dict[Backend, Callable[[torch.device], tuple[tuple[Hashable, ...], int] | None]] = {
    triton: triton_launch.tape_setting,
    cuda: cuda_runtime.tape_setting,
}


def few(n: int, m: int, d: int) -> bool:
    """Whether a problem of N x M x D is small enough for a tape."""
    size = (n + m) * d
    return size <= MOST_ON_TAPE or (size <= MOST_OF_QUEUES and n * m * d <= FEW_PRODUCTS)


def _taped(
    taped: Taped, problem: Problem, backend: Backend, options: Any, *tensors: Tensor | None
) -> tuple[Any, Tape | None]:
    """The function of `taped`, replayed from its tape where launches take the host longer than the device."""
    _, n, m = problem.sizes
    if few(n, m, problem.anchors.values.shape[1]) and backend in TAPE_SETTINGS and problem.device.type == TAPED:
        setting = TAPE_SETTINGS[backend](problem.device)
        if setting is not None:
            with without_autocast(problem.device):  # a tape holds operators as they run without it
                return taped(options, *setting, *tensors, at_once=taped is _BACKWARD and SEES_HOOKS)
    return taped.function(options, *tensors), None


def unpacked(saved: Sequence[Tensor | None], tape: Tape | None) -> Sequence[Tensor | None]:
    """The arguments and what `mean_forward` keeps, from what its replay from a tape returned in place of the latter."""
    return saved if tape is None else (*saved[:TENSORS], *tape.outputs(saved[TENSORS:]))


def hashable(options: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(option) if isinstance(option, list) else option for option in options)


def _with(ctx: Any, loss: Tensor, observed: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if observed is None:
        return loss
    ctx.mark_non_differentiable(observed)
    return loss, observed


def _scaled(_: Any, __: Any, grad: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """The forward's gradients times `grad`, each in the dtype of its argument."""
    return _as_arguments([found if found is None else found * grad for found in saved[TENSORS:]], saved)


def _gradients(options: Any, needs: Sequence[bool], grad: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
    problem, _ = parsed((*saved[:TENSORS], *options))
    return _as_arguments(cpu.mean_backward(problem, saved[TENSORS], grad, Needs(*needs)), saved)


def _as_arguments(gradients: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    arguments = [saved[place] for place in gradient_places(saved)]
    return tuple(
        None if gradient is None or argument is None else gradient.to(argument.dtype)
        for gradient, argument in zip(gradients, arguments, strict=True)
    )


class _Rows(NamedTuple):
    """What the loss of a side's rows and its derivative depend on. A mask of None is true for all rows."""

    counted: Tensor | None  # bool [N]
    single: Tensor | None  # bool [N]: one positive; with `log_ratio` only
    log_ratio: Tensor | None  # [N]: log(neg / pos), of single positives; None: lse is lse_neg


def derived(
    saved: Sequence[Any], options: Sequence[Any], needs: list[bool], grad: Tensor, tape: Tape | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments from the gradient of the mean. saved: arguments, and what `mean_forward` returns."""
    if torch.is_grad_enabled() or intercepted(saved[0], grad):  # run the operator, which a tracer sees
        *rest, first = (saved := unpacked(saved, tape))[: TENSORS + KEPT + 1]
        of_fields: list[Tensor | None] = [
            each * grad for each in (first, *saved[TENSORS + KEPT + 1 :]) if each is not None
        ]
        return differentiate_saved(rest, options, needs, *of_fields, *[None] * (2 - len(of_fields)))
    kinds = (*hashable(options), tuple(needs), tape)
    if tape is None and SEES_HOOKS:  # of a call that is not replayed
        return by_argument(saved, mean_backward(kinds, *saved, grad))
    problem, backend = parsed((*saved[:TENSORS], *options))
    found, _ = _taped(_BACKWARD, problem, backend, kinds, *saved, grad)
    return by_argument(saved, found)


def rows_of(side: Side, want: Sequence[str], look: bool) -> _Rows:
    """look: read the counts. If all rows count, no mask is needed, which saves operators in the common case. On a GPU
    it would wait for the device."""
    positives = side.counts[0]
    if want[0] == "lse_neg":
        counted = side.counts.amin(0) > 0
        return _Rows(None if look and bool(counted.all()) else counted, None, None)
    shift, total = side.parts[:, 1, 0]
    # The logit of a single positive is its log-sum-exp. Shift and logit are subtracted first: if logits are large and
    # nearly equal they cancel, and the field lse_neg is already rounded at their size.
    log_ratio = (shift - side.fields[2, 0]).add_(total.log())
    least, most = torch.stack(positives.aminmax()).tolist() if look else (0, 2)
    return _Rows(None if least > 0 else positives > 0, None if least == most == 1 else positives == 1, log_ratio)


def _mean(side: Side, rows: _Rows) -> Tensor:
    terms = terms_of(side, rows)
    if rows.counted is None:
        return terms.mean()
    return torch.where(rows.counted, terms, 0).sum() / rows.counted.sum().clamp(min=1)


def terms_of(side: Side, rows: _Rows) -> Tensor:
    """The loss [N] of each row; of rows that do not count undefined."""
    sum_pos, num_pos = side.fields[-1], side.counts[0]
    if rows.log_ratio is not None:
        # Linear beyond the threshold, to within a rounding. 0 * sum_pos makes the loss NaN if the logit is infinite.
        singles = torch.add(torch.nn.functional.softplus(rows.log_ratio, threshold=50), sum_pos, alpha=0)
        if rows.single is None:
            return singles[0]
    terms = torch.addcdiv(side.fields[0], sum_pos, num_pos if rows.counted is None else num_pos.clamp(min=1), value=-1)
    if rows.single is not None:
        terms = torch.where(rows.single, singles, terms)
    return terms[0]


def _of_mean(counts: Tensor, rows: _Rows, means: int) -> Tensor:
    """The derivative of the mean of `means` `_mean`s in the fields [W, 1, N] of one of them."""
    weight = counts.new_full((), 1 / (counts.shape[1] * means))
    if rows.counted is not None:
        of_rows = rows.counted.to(counts.dtype)
        weight = of_rows / (of_rows.sum().clamp(min=1) * means)
    return derivative(counts, rows, weight)


def derivative(counts: Tensor, rows: _Rows, weight: Tensor) -> Tensor:
    """The derivative of the weighted sum of the rows' losses in the fields, [W, 1, N].

    weight: [], or [N] with 0 for rows that do not count.
    """
    n = counts.shape[1]
    num_pos = counts[0] if rows.counted is None else counts[0].clamp(min=1)
    result = counts.new_zeros(2 if rows.log_ratio is None else 3, 1, n)
    if rows.log_ratio is None:
        result[0] = weight
        result[1] = weight / -num_pos
        return result
    negatives = rows.log_ratio.sigmoid().mul_(weight)  # the negatives' share of the sum, 1 - the positive's
    if rows.single is None:
        result[1] = negatives
        result[2, 0] = -negatives
        return result
    result[0] = torch.where(rows.single, 0, weight)
    result[1] = torch.where(rows.single, negatives, 0)
    result[2] = torch.where(rows.single, -negatives, weight / -num_pos)
    return result


def taken_apart(
    outputs: Sequence[Tensor], one_scale: bool, want: Sequence[str], both: bool, exact: bool
) -> tuple[Tensor, ...]:
    """For each side the wanted fields, [N] with one scale, else [S, N], then num_pos and num_neg.

    exact: return float64 fields, with log-sum-exps computed from their parts instead of the rounded fields.
    """
    fields, counts, parts, contrast_fields, contrast_counts, contrast_parts, *_ = outputs
    if exact:
        fields, contrast_fields = _unrounded(fields, parts, want), _unrounded(contrast_fields, contrast_parts, want)
    values = (*(fields.flatten(0, 1) if one_scale else fields).unbind(0), *counts.unbind(0))
    if not both:
        return values
    other = contrast_fields.flatten(0, 1) if one_scale else contrast_fields
    return *values, *other.unbind(0), *contrast_counts.unbind(0)


def _unrounded(fields: Tensor, parts: Tensor, want: Sequence[str]) -> Tensor:
    wide = fields.double()
    shift, total = parts.detach().double()
    log_sums = iter((shift + total.log()).unbind(0))
    exact = [next(log_sums) if field in LOG_SUMS else rounded for field, rounded in zip(want, wide, strict=True)]
    if not exact:
        return wide
    rest = torch.stack(exact).detach() - wide.detach()
    return wide + torch.where(rest.isfinite(), rest, 0)  # the derivative is that of the fields


def _counts_among(values: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    return tuple(value for k, value in enumerate(values) if k % (wanted + 2) >= wanted)


def stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    some = next((grad for grad in grads if grad is not None), None)
    if some is None:
        return None
    stacked = torch.stack([torch.zeros_like(some) if grad is None else grad for grad in grads])
    return stacked if stacked.dim() == 3 else stacked[:, None]
