"""The operators: schemas, shapes for tracing, derivatives, and the one place that chooses a backend.

They are registered with `torch.library` as opaque operators, so that torch.compile sees one node; the derivative is an
operator of its own whose derivative raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import chunked, cuda_engine, cuda_native, native, paired, reference, triton_engine
from .checks import shown
from .observed import NAMES as OBSERVED
from .problem import Gradients, Needs, Problem, Side, Statistics

# Backends.

BACKENDS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}

# Backends that are not here, and why.
MISSING: dict[str, str] = {}

_engine, _reason = native.engine()
if _engine is None:
    MISSING["cpu"] = _reason
else:
    BACKENDS["cpu"] = native

_there, _reason = triton_engine.availability()
if _there:
    BACKENDS["triton"] = triton_engine
else:
    MISSING["triton"] = _reason

_there, _reason = cuda_native.availability()
if _there:
    BACKENDS["cuda"] = cuda_engine
else:
    MISSING["cuda"] = _reason

_chosen: ContextVar[str | None] = ContextVar("fastcl_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Fixes the backend inside a ``with`` block, for the current thread or task.

    Args:
        name: ``"reference"`` (everything materialised: the specification in code), ``"chunked"`` (plain PyTorch in
            blocks of rows), ``"cpu"`` (C++ on x86-64), ``"triton"`` or ``"cuda"`` (GPUs; float64 rows go through
            ``"chunked"``). The environment variable ``FASTCL_BACKEND`` does the same for a process; this wins over it.

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
        raise TypeError(f"{source}: expected the name of a backend ({', '.join(BACKENDS)}), got {shown(name)}")
    if name in BACKENDS:
        return name
    options = ", ".join(map(repr, BACKENDS))
    reason = f", which is not available here: {MISSING[name]}" if name in MISSING else ""
    raise ValueError(f"{source}: expected one of {options}, got {name!r}{reason}")


def choose_backend(device: torch.device, dtype: torch.dtype, op: str = "contrastive_stats") -> str:
    """The backend for rows on `device` whose products have `dtype`: the one asked for, else the fastest there is."""
    if device.type == "cpu" and (wrong := native.wrong_cap()):
        raise ValueError(wrong)
    chosen, source = _chosen.get(), "use_backend"
    if chosen is None and os.environ.get("FASTCL_BACKEND"):
        source = "FASTCL_BACKEND"
        chosen = _available(os.environ[source], source)
    if chosen is None:
        if device.type == "cpu":
            return "cpu" if "cpu" in BACKENDS else "chunked"
        if "cuda" in BACKENDS and dtype != torch.float64 and cuda_native.measured_faster(device, op):
            return "cuda"
        here = device.type == "cuda" and "triton" in BACKENDS and dtype != torch.float64
        return "triton" if here and not triton_engine.refusal(device) else "chunked"
    if chosen == "cpu" and device.type != "cpu":
        raise ValueError(f"{source}: 'cpu' takes tensors on the CPU, got tensors on {device}")
    if chosen == "triton" and (reason := triton_engine.refusal(device)):
        raise ValueError(f"{source}: 'triton' {reason}")
    if chosen == "cuda" and (reason := cuda_native.refusal(device)):
        raise ValueError(f"{source}: 'cuda' {reason}")
    return chosen


# Tracing cannot look into context variables or the environment: what they say then becomes part of the graph. This is
# torch.compiler.assume_constant_result, which would import the whole compiler with fastcl, for seconds.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Schemas.

_library = torch.library.Library("fastcl", "DEF")

_PROBLEM = (
    "Tensor anchors, Tensor? contrasts, Tensor? paired, Tensor? anchor_clusters, Tensor? contrast_clusters, "
    "Tensor logit_scale, Tensor? contrast_bias, Tensor? anchor_ids, Tensor? contrast_ids, bool normalize_anchors, "
    "bool normalize_contrasts, str[] want, bool both, bool anchors_only, bool observe, str backend"
)
TENSORS, WANT, BOTH = 9, 11, 12  # leading tensor arguments; the places of `want` and `both`
DIFFERENTIABLE = {"anchors": 0, "contrasts": 1, "logit_scale": 5, "contrast_bias": 6, "paired": 2}  # as in Needs
_PROBLEM_LENGTH = _PROBLEM.count(",") + 1
_library.define(
    f"contrastive_stats_fwd({_PROBLEM}) -> (Tensor fields, Tensor counts, Tensor parts, Tensor contrast_fields, "
    "Tensor contrast_counts, Tensor contrast_parts, Tensor anchor_inverse_norms, Tensor contrast_inverse_norms, "
    "Tensor saved, Tensor observed)"
)
_library.define(
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


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Rows reach a backend in the dtype they have; its products must not be rounded behind its back."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def statistics(problem: Problem, backend: ModuleType) -> Statistics:
    with _without_autocast(problem.device):
        return paired.join(problem, backend.forward(problem))


def gradients(
    problem: Problem, backend: ModuleType, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs
) -> Gradients:
    """From the gradients [W, S, N] and [W, S, M] of the fields."""
    with _without_autocast(problem.device):
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


# Derivatives.


_PLAIN_KEYS = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


def intercepted(*tensors: Tensor | None) -> bool:
    """Whether somebody wants to see the operator (a tracer, a mode, a transform), or a tensor is not a plain one."""
    if (
        torch.compiler.is_compiling()  # first: what follows cannot be traced
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    for tensor in tensors:  # noqa: SIM110 - a generator would cost as much again
        if tensor is not None and torch._C._dispatch_keys(tensor).raw_repr() != _PLAIN_KEYS:
            return True
    return False


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


def no_second_derivatives(of: str = "contrastive_stats") -> None:
    raise RuntimeError(f"fastcl.{of}: second derivatives are not supported")


def _differentiable(op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The Autograd kernel: `function` where there is something to differentiate, else straight on to the backend."""

    def kernel(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(f"{op}: derivatives by torch.func are not supported, those by autograd are")
            return function.apply(*args)
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{op}: forward-mode derivatives are not supported")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def _last(op: Any, public: str) -> type[torch.autograd.Function]:
    """Of a derivative, which has none itself."""

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                outputs: tuple[Tensor, ...] = op(*args)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            no_second_derivatives(public)

    return Derivative


Kernel = Callable[..., Any]


def register(
    name: str,
    function: type[torch.autograd.Function],
    forward: tuple[Kernel, Kernel],
    backward: tuple[Kernel, Kernel],
    public: str,
) -> None:
    """Kernels of the operators ``name_fwd`` and ``name_bwd``, which are defined: what runs, and its shapes for tracing.

    function: the derivative of the first. That of the second raises, in the name of what is `public`.
    """
    for kind, (kernel, fake) in (("fwd", forward), ("bwd", backward)):
        op = getattr(torch.ops.fastcl, f"{name}_{kind}")
        derivative = function if kind == "fwd" else _last(op, public)
        _library.impl(f"{name}_{kind}", kernel, "CompositeExplicitAutograd")
        _library.impl(f"{name}_{kind}", _differentiable(op, derivative), "Autograd")
        torch.library.register_fake(f"fastcl::{name}_{kind}", fake, lib=_library)


register(
    "contrastive_stats",
    _ContrastiveStats,
    (run_forward, _forward_fake),
    (_backward_impl, _backward_fake),
    "contrastive_stats",
)
