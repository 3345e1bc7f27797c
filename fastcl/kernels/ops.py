"""The operators: schemas, shapes for tracing, derivatives, and the one place that chooses a backend.

`contrastive_stats` is what the losses call. It is registered with `torch.library` as an opaque operator, so that
torch.compile sees one node; its derivative is an operator of its own whose derivative raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import chunked, native, paired, reference
from .checks import (
    LARGEST,
    check_device,
    check_flag,
    check_ids,
    check_rows,
    check_vector,
    finite_number,
    scalar_tensor,
    values_visible,
)
from .problem import FIELDS, Needs, Problem, Side, Statistics, accumulation_dtype

# Backends.

BACKENDS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}

# Backends that are not here, and why.
MISSING = {
    "triton": "not part of this version (Triton kernels for GPUs)",
    "cuda": "not part of this version (CUDA C++ kernels for NVIDIA GPUs)",
}

_engine, _reason = native.engine()
if _engine is None:
    MISSING["cpu"] = _reason
else:
    BACKENDS["cpu"] = native

_chosen: ContextVar[str | None] = ContextVar("fastcl_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Fixes the backend inside a ``with`` block, for the current thread or task.

    Args:
        name: ``"reference"`` (everything materialised: the specification in code) or ``"chunked"`` (plain PyTorch in
            blocks of rows). The environment variable ``FASTCL_BACKEND`` does the same for a process; this wins over it.

    A backward runs on the backend of its forward. A function under ``torch.compile`` keeps the backend that it was
    traced with.

    Raises:
        ValueError: if there is no such backend, or it is not available here; the message says why.
    """
    token = _chosen.set(_available(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _available(name: str, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected the name of a backend ({', '.join(BACKENDS)}), got {name!r}")
    if name in BACKENDS:
        return name
    options = ", ".join(map(repr, BACKENDS))
    reason = f", which is {MISSING[name]}" if name in MISSING else ""
    raise ValueError(f"{source}: expected one of {options}, got {name!r}{reason}")


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for rows on `device` whose products have `dtype`: the one asked for, else the fastest there is."""
    if device.type == "cpu" and (wrong := native.wrong_cap()):
        raise ValueError(wrong)
    chosen, source = _chosen.get(), "use_backend"
    if chosen is None and os.environ.get("FASTCL_BACKEND"):
        source = "FASTCL_BACKEND"
        chosen = _available(os.environ[source], source)
    if chosen is None:
        return "cpu" if device.type == "cpu" and "cpu" in BACKENDS else "chunked"
    if chosen == "cpu" and device.type != "cpu":
        raise ValueError(f"{source}: 'cpu' takes tensors on the CPU, got tensors on {device}")
    return chosen


# Tracing cannot look into context variables or the environment: what they say then becomes part of the graph. This is
# torch.compiler.assume_constant_result, which would import the whole compiler with fastcl, for seconds.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Schemas.

_library = torch.library.Library("fastcl", "DEF")

_PROBLEM = (
    "Tensor anchors, Tensor? contrasts, Tensor? paired, Tensor? anchor_clusters, Tensor? contrast_clusters, "
    "Tensor logit_scale, Tensor? contrast_bias, Tensor? anchor_ids, Tensor? contrast_ids, bool normalize_anchors, "
    "bool normalize_contrasts, str[] want, bool both, bool anchors_only, str backend"
)
_TENSORS, _WANT, _BOTH = 9, 11, 12  # leading tensor arguments; the places of `want` and `both`
_DIFFERENTIABLE = {"anchors": 0, "contrasts": 1, "logit_scale": 5, "contrast_bias": 6, "paired": 2}  # as in Needs
_PROBLEM_LENGTH = _PROBLEM.count(",") + 1
_library.define(
    f"contrastive_stats_fwd({_PROBLEM}) -> (Tensor fields, Tensor counts, Tensor parts, Tensor contrast_fields, "
    "Tensor contrast_counts, Tensor contrast_parts, Tensor anchor_inverse_norms, Tensor contrast_inverse_norms, "
    "Tensor saved)"
)
_library.define(
    f"contrastive_stats_bwd({_PROBLEM}, Tensor counts, Tensor parts, Tensor contrast_counts, Tensor contrast_parts, "
    "Tensor anchor_inverse_norms, Tensor contrast_inverse_norms, Tensor saved, Tensor grad_fields, "
    "Tensor grad_contrast_fields, "
    "bool[] needs) -> (Tensor anchors, Tensor contrasts, Tensor logit_scale, Tensor contrast_bias, Tensor paired)"
)
_forward = torch.ops.fastcl.contrastive_stats_fwd
_backward = torch.ops.fastcl.contrastive_stats_bwd


def _problem(args: Sequence[Any]) -> tuple[Problem, ModuleType]:
    *problem, backend = args
    return Problem(*problem), BACKENDS[backend]


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Rows reach a backend in the dtype they have; its products must not be rounded behind its back."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _forward_impl(*args: Any) -> tuple[Tensor, ...]:
    problem, backend = _problem(args)
    with _without_autocast(problem.device):
        anchors, contrasts, *others = paired.join(problem, backend.forward(problem))
    return *anchors, *contrasts, *others


def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    problem, backend = _problem(args[:_PROBLEM_LENGTH])
    counts, parts, contrast_counts, contrast_parts, *others, grad, grad_contrasts, flags = args[_PROBLEM_LENGTH:]
    needs = Needs(*flags)
    saved = Statistics(Side(grad, counts, parts), Side(grad_contrasts, contrast_counts, contrast_parts), *others)
    with _without_autocast(problem.device):
        swept = backend.backward(problem, saved, grad, grad_contrasts, needs)
        gradients: tuple[Any, ...] = paired.add_gradients(problem, saved, grad, needs, swept)
    sources = [args[i] for i in _DIFFERENTIABLE.values()]
    return tuple(
        gradient.to(source.dtype).contiguous() if need and source is not None else grad.new_empty(0)
        for need, gradient, source in zip(needs, gradients, sources, strict=True)
    )


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, backend = _problem(args)
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
    return *side(n), *side(m if problem.both else 0), a, c, new(backend.saved_size(problem))


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    problem, _ = _problem(args[:_PROBLEM_LENGTH])
    sources = [args[i] for i in _DIFFERENTIABLE.values()]
    return tuple(
        source.new_empty(source.shape) if need and source is not None else problem.logit_scale.new_empty(0)
        for need, source in zip(args[-1], sources, strict=True)
    )


# Derivatives.


_PLAIN_KEYS = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


def _intercepted(*tensors: Tensor | None) -> bool:
    """Whether somebody wants to see the operator (a tracer, a mode, a transform), or a tensor is not a plain one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or any(t is not None and torch._C._dispatch_keys(t).raw_repr() != _PLAIN_KEYS for t in tensors)
    )


class _ContrastiveStats(torch.autograd.Function):
    """The operator's derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = _forward(*args)
        ctx.mark_non_differentiable(*_save(ctx, args, outputs))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grads[0], grads[3])


class _DirectStats(torch.autograd.Function):
    """The same past the dispatcher, for where nobody looks on: each statistic is an output of its own.

    A small batch takes less time than the operator's way through torch, and than taking its stacked outputs apart.
    """

    @staticmethod
    def forward(ctx: Any, *args_and_scales: Any) -> tuple[Tensor, ...]:
        *args, one_scale = args_and_scales
        outputs = _forward_impl(*args)
        _save(ctx, args, outputs)
        values = _taken_apart(outputs, one_scale, args[_BOTH])
        ctx.mark_non_differentiable(*_counts_among(values, len(args[_WANT])))
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = len(ctx.options[_WANT - _TENSORS])
        both_sides = _stacked(grads[:wanted]), _stacked(grads[wanted + 2 : 2 * wanted + 2])
        return *_differentiate(ctx, *both_sides), None


def _taken_apart(outputs: Sequence[Tensor], one_scale: bool, both: bool) -> tuple[Tensor, ...]:
    """Of each side the wanted fields, [N] with one scale, else [S, N], then num_pos and num_neg."""
    fields, counts, _, contrast_fields, contrast_counts, *_ = outputs
    values = (*(fields.flatten(0, 1) if one_scale else fields).unbind(0), *counts.unbind(0))
    if not both:
        return values
    other = contrast_fields.flatten(0, 1) if one_scale else contrast_fields
    return *values, *other.unbind(0), *contrast_counts.unbind(0)


def _counts_among(values: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    return tuple(value for k, value in enumerate(values) if k % (wanted + 2) >= wanted)


def _save(ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Keeps what the backward needs; returns what of the outputs that is."""
    _, counts, parts, _, contrast_counts, contrast_parts, *others = outputs
    saved = (counts, parts, contrast_counts, contrast_parts, *others)
    ctx.set_materialize_grads(False)  # zeros for every output, saved ones too, cost more than small kernels
    ctx.save_for_backward(*args[:_TENSORS], *saved)
    ctx.options = args[_TENSORS:]
    return saved


def _stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    some = next((grad for grad in grads if grad is not None), None)
    if some is None:
        return None
    stacked = torch.stack([torch.zeros_like(some) if grad is None else grad for grad in grads])
    return stacked if stacked.dim() == 3 else stacked[:, None]


def _differentiate(ctx: Any, grad: Tensor | None, grad_contrasts: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments from those of the fields [W, S, N] of both sides; None: zeros."""
    saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE.values()]
    counts, parts, contrast_counts = saved[_TENSORS : _TENSORS + 3]
    shape = len(ctx.options[_WANT - _TENSORS]), parts.shape[2]
    if grad is None:
        grad = counts.new_zeros(*shape, counts.shape[1])
    if grad_contrasts is None:
        grad_contrasts = counts.new_zeros(*shape, contrast_counts.shape[1])
    arguments = (*saved[:_TENSORS], *ctx.options, *saved[_TENSORS:], grad, grad_contrasts, needs)
    # With gradients on, somebody wants to differentiate this: the operator will tell that it cannot be done.
    plain = not torch.is_grad_enabled() and not _intercepted(saved[0], grad, grad_contrasts)
    results = (_backward_impl if plain else _backward)(*arguments)
    by_argument: list[Tensor | None] = [None] * _PROBLEM_LENGTH
    for i, need, gradient in zip(_DIFFERENTIABLE.values(), needs, results, strict=True):
        by_argument[i] = gradient if need else None
    return tuple(by_argument)


class _ContrastiveStatsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = _backward(*args)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("fastcl.contrastive_stats: second derivatives are not supported")


def _differentiable(op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The Autograd kernel: `function` where there is something to differentiate, else straight on to the backend."""

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


for _name, _impl, _fake, _function in (
    ("contrastive_stats_fwd", _forward_impl, _forward_fake, _ContrastiveStats),
    ("contrastive_stats_bwd", _backward_impl, _backward_fake, _ContrastiveStatsBackward),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    _library.impl(_name, _differentiable(getattr(torch.ops.fastcl, _name), _function), "Autograd")
    torch.library.register_fake(f"fastcl::{_name}", _fake, lib=_library)


# What the losses call.


@dataclass(frozen=True, eq=False)
class ContrastiveStats:
    """Statistics of each anchor over its contrasts, or of each contrast over its anchors. None where not wanted.

    Shapes are ``[N]``, or ``[S, N]`` (counts: ``[N]``) where several scales were asked for. Natural logarithms.
    An empty set has log-sum-exp ``-inf`` and sum 0; gradients of such entries are taken for zero.
    """

    lse_all: Tensor | None
    """log-sum-exp of the logits over all admissible contrasts"""
    lse_pos: Tensor | None
    """the same over the positives"""
    lse_neg: Tensor | None
    """the same over the negatives"""
    sum_pos: Tensor | None
    """sum of the logits over the positives"""
    num_pos: Tensor
    """number of positives, in the fields' dtype"""
    num_neg: Tensor
    """number of negatives, in the fields' dtype"""
    reverse: ContrastiveStats | None
    """the statistics of each contrast over the anchors, ``[M]``, where ``both=True``"""

    @property
    def valid(self) -> Tensor:
        """Bool ``[N]``: whether every wanted field of the row is over a non-empty set."""
        valid = torch.ones_like(self.num_pos, dtype=torch.bool)
        if self.lse_all is not None:
            valid = valid & (self.num_pos + self.num_neg > 0)
        if self.lse_pos is not None or self.sum_pos is not None:
            valid = valid & (self.num_pos > 0)
        if self.lse_neg is not None:
            valid = valid & (self.num_neg > 0)
        return valid


def sweep(
    anchors: Tensor,
    contrasts: Tensor | None,
    anchor_clusters: Tensor | None,
    contrast_clusters: Tensor | None,
    logit_scale: Tensor,
    *,
    normalize_anchors: bool,
    normalize_contrasts: bool,
    positives: Tensor | None = None,
    contrast_bias: Tensor | None = None,
    anchor_ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    want: Sequence[str],
    both: bool = False,
) -> ContrastiveStats:
    """`contrastive_stats` of checked arguments: ids int64, of which -1 alone equals nothing; scale [] or [S].

    `positives` [N, D], normalised if the anchors are, are one more positive of each anchor and nobody else's contrast.
    """
    dtype = accumulation_dtype(anchors, contrasts, positives)
    order = [field for field in FIELDS if field in want]
    scales = logit_scale.to(dtype).reshape(-1)
    bias = None if contrast_bias is None else contrast_bias.to(dtype)
    arguments = (
        anchors,
        contrasts,
        positives,
        anchor_clusters,
        contrast_clusters,
        scales,
        bias,
        anchor_ids,
        contrast_ids,
        normalize_anchors,
        normalize_contrasts,
        order,
        both,
        # Contrasts without a gradient, as in a queue, spare the backward its sweep where the forward knows of it.
        contrasts is not None
        and torch.is_grad_enabled()
        and anchors.requires_grad
        and not (both or contrasts.requires_grad or scales.requires_grad or (bias is not None)),
        choose_backend(anchors.device, dtype),
    )
    one_scale = logit_scale.dim() == 0
    if _intercepted(anchors, contrasts, positives, scales, bias):
        values = _taken_apart(_forward(*arguments), one_scale, both)
    else:
        values = _DirectStats.apply(*arguments, one_scale)

    def named(values: Sequence[Tensor], reverse: ContrastiveStats | None) -> ContrastiveStats:
        *fields, num_pos, num_neg = values
        by_name = dict(zip(order, fields, strict=True))
        lse_all, lse_pos, lse_neg, sum_pos = (by_name.get(field) for field in FIELDS)
        return ContrastiveStats(lse_all, lse_pos, lse_neg, sum_pos, num_pos, num_neg, reverse)

    side = len(order) + 2
    return named(values[:side], named(values[side:], None) if both else None)


def contrastive_stats(
    anchors: Tensor,
    contrasts: Tensor | None = None,
    anchor_clusters: Tensor | None = None,
    contrast_clusters: Tensor | None = None,
    *,
    logit_scale: float | Tensor = 1.0,
    normalize_anchors: bool = False,
    normalize_contrasts: bool = False,
    contrast_bias: Tensor | None = None,
    anchor_ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    want: Iterable[str] = ("lse_all", "sum_pos"),
    both: bool = False,
) -> ContrastiveStats:
    r"""Statistics of contrastive logits, in one pass that never stores them.

    The logits are

    .. math:: s_{ij} = \text{logit\_scale} \cdot a_i \, c_j \, \langle x_i, y_j \rangle + \text{bias}_j

    with :math:`a`, :math:`c` either 1 or, for cosine similarity, the rows' inverse norms (norms floored at 1e-12; a row
    of zeros has similarity 0 and gradient 0). For anchor i, A_i are its admissible contrasts (self-contrast: all
    j != i; two sets: all j but those of the anchor's sample id), P_i those of A_i in the anchor's cluster, N_i the
    rest of A_i.

    A contrastive loss is a formula of the result. SupCon, for instance::

        s = contrastive_stats(z, anchor_clusters=labels, logit_scale=1 / 0.07, normalize_anchors=True)
        loss = (s.lse_all - s.sum_pos / s.num_pos)[s.valid].mean()

    Args:
        anchors: ``[N, D]``; float64, float32, bfloat16 or float16.
        contrasts: ``[M, D]``, or None for self-contrast: the contrasts are the anchors, normalised as they are.
        anchor_clusters: ``[N]`` integers; negative: in no cluster, equal to nothing. None: there are no positives.
        contrast_clusters: ``[M]`` integers; two sets take both or neither.
        logit_scale: 1 / temperature; a number, a tensor of no dimension, or ``[S]`` scales at once.
        normalize_anchors, normalize_contrasts: cosine similarity.
        contrast_bias: ``[M]``, finite, added to the contrast's logits (for instance minus a log frequency).
        anchor_ids, contrast_ids: ``[N]``, ``[M]`` integers; equal ones make a pair inadmissible; negative: no id.
        want: of ``"lse_all"``, ``"lse_pos"``, ``"lse_neg"``, ``"sum_pos"``; only these are computed.
        both: two sets: also each contrast's statistics over the anchors, from the same sweep, as ``.reverse``.

    Returns:
        :class:`ContrastiveStats`, differentiable once in anchors, contrasts, logit_scale and contrast_bias.
        float32; float64 where a set of rows is float64. Rows of two dtypes are multiplied in the wider one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """
    check_rows("anchors", anchors)
    n = anchors.shape[0]
    for name, flag in (
        ("normalize_anchors", normalize_anchors), ("normalize_contrasts", normalize_contrasts), ("both", both)
    ):  # fmt: skip
        check_flag(name, flag)
    if contrasts is not None:
        check_rows("contrasts", contrasts, like=anchors)
        m = contrasts.shape[0]
    else:
        m = n
        for name, value in (
            ("contrast_clusters", contrast_clusters), ("anchor_ids", anchor_ids), ("contrast_ids", contrast_ids)
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        if both:
            raise ValueError("both: expected False for self-contrast (contrasts=None), got True")
        if normalize_contrasts and not normalize_anchors:
            raise ValueError(
                "normalize_contrasts: self-contrast (contrasts=None) normalises both sides or none; "
                "expected normalize_anchors=True with it, got False"
            )
    ids = {}
    for left, right, values in (
        ("anchor_clusters", "contrast_clusters", (anchor_clusters, contrast_clusters)),
        ("anchor_ids", "contrast_ids", (anchor_ids, contrast_ids)),
    ):
        if contrasts is not None and (values[0] is None) != (values[1] is None):
            given, absent = (left, right) if values[1] is None else (right, left)
            raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
        for name, value, length in zip((left, right), values, (n, m), strict=True):
            if value is not None:
                check_ids(name, value, length, anchors.device)
            ids[name] = None if value is None else value.to(torch.int64).clamp(min=-1)
    if contrast_bias is not None:
        check_vector("contrast_bias", contrast_bias, m, anchors.device)
    return sweep(
        anchors,
        contrasts,
        ids["anchor_clusters"],
        ids["contrast_clusters"],
        _scale_tensor(logit_scale, anchors, accumulation_dtype(anchors, contrasts)),
        normalize_anchors=normalize_anchors,
        normalize_contrasts=normalize_contrasts,
        contrast_bias=contrast_bias,
        anchor_ids=ids["anchor_ids"],
        contrast_ids=ids["contrast_ids"],
        want=_check_want(want),
        both=both,
    )


def _check_want(want: Iterable[str]) -> tuple[str, ...]:
    expected = f"want: expected some of {', '.join(map(repr, FIELDS))}"
    if isinstance(want, str) or not isinstance(want, Iterable):
        raise TypeError(f"{expected} in a tuple or list, got {want!r}")
    fields = tuple(want)
    if not all(field in FIELDS for field in fields):
        raise ValueError(f"{expected}, got {fields!r}")
    return fields


def _scale_tensor(value: float | Tensor, anchors: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"logit_scale: expected a floating dtype, got {value.dtype}")
        if value.dim() > 1 or value.numel() == 0:
            raise ValueError(f"logit_scale: expected shape [] or [S], got {list(value.shape)}")
        if values_visible(value) and not bool((value.abs() <= LARGEST).all()):
            raise ValueError(f"logit_scale: expected finite numbers in the range of float32, got {value.tolist()}")
        if value.dim() == 1:
            check_device("logit_scale", value, anchors.device)
            return value
    else:
        value = finite_number("logit_scale", value)
    return scalar_tensor("logit_scale", value, anchors.device, dtype)
