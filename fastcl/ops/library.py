"""Registers operators with torch: kernels, shapes for tracing, and first derivatives; second derivatives raise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable` without importing the compiler; importing it takes seconds."""
    disabled: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    # Dynamo reads this mark while it traces, and leaves the call out of the graph.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


# Schemas.

LIBRARY = torch.library.Library("fastcl", "DEF")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disables autocast, which would round the backend's products."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


# Derivatives.


def _keys_of(device: str) -> int:
    """The dispatch keys of a plain tensor on a device, which need not exist here."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    for name in ("ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    found: int = keys.raw_repr()
    return found


_PLAIN_KEYS = frozenset(map(_keys_of, ("CPU", "CUDA")))


def intercepted(*tensors: Tensor | None) -> bool:
    """Whether a tracer, mode or transform is active, or a tensor is not a plain CPU or CUDA tensor."""
    if (
        torch.compiler.is_compiling()  # first: the calls below cannot be traced
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    for tensor in tensors:
        if tensor is not None and torch._C._dispatch_keys(tensor).raw_repr() not in _PLAIN_KEYS:
            return True
    return False


class _Last(torch.autograd.Function):
    """Runs `work`, the computation of a first derivative; differentiating the result raises."""

    @staticmethod
    def forward(ctx: Any, public: str, work: Callable[..., Any], *args: Any) -> Any:
        ctx.public = public
        return work(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise RuntimeError(f"fastcl.{ctx.public}: second derivatives are not supported")


def once_differentiable(public: str, work: Callable[..., Any], *args: Any) -> Any:
    """work(*args) in a backward. With gradients enabled the result is part of a graph and raises when differentiated.

    public: name of the function in the error message.
    """
    return _Last.apply(public, work, *args) if torch.is_grad_enabled() else work(*args)


def _apart(args: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """The arguments with the elements of lists in their place, and each argument's number of elements; None: no list.

    autograd does not look into lists.
    """
    flat: list[Any] = []
    sizes: list[int | None] = []
    for value in args:
        listed = isinstance(value, (list, tuple))
        flat.extend(value if listed else [value])
        sizes.append(len(value) if listed else None)
    return flat, sizes


def _together(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """The inverse of `_apart`."""
    rest = iter(flat)
    return [next(rest) if size is None else [next(rest) for _ in range(size)] for size in sizes]


def _last(public: str, op: Any, *args: Any) -> Any:
    """The Autograd kernel of a first derivative."""
    flat, sizes = _apart(args)
    several = False

    def work(*values: Any) -> Any:
        nonlocal several
        found = _below_autograd(op, *_together(values, sizes))
        several = isinstance(found, list)
        return tuple(found) if several else found

    found = _Last.apply(public, work, *flat)
    return list(found) if several else found


def _below_autograd(op: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _differentiable(op: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The Autograd kernel: `apply` if a tensor requires a gradient, else the kernel below autograd."""

    def kernel(*args: Any) -> Any:
        tensors = [a for a in _apart(args)[0] if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(f"{op}: derivatives by torch.func are not supported, those by autograd are")
            return apply(*args)
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{op}: forward-mode derivatives are not supported")
        return _below_autograd(op, *args)

    return kernel


Kernel = Callable[..., Any]


def register(
    name: str,
    function: Any,
    forward: tuple[Kernel, Kernel],
    backward: tuple[Kernel, Kernel],
    public: str,
) -> None:
    """Registers kernels of the operators ``name_fwd`` and ``name_bwd``, whose schemas must already be defined.

    function: its `apply`, as of a `torch.autograd.Function`, gives ``name_fwd`` its derivative. forward, backward: the
    kernel of each operator, and the function that computes its output shapes for tracing. public: name of the function
    in the error that the derivative of ``name_bwd`` raises.
    """
    for kind, (kernel, fake) in (("fwd", forward), ("bwd", backward)):
        op = getattr(torch.ops.fastcl, f"{name}_{kind}")
        apply = function.apply if kind == "fwd" else partial(_last, public, op)
        LIBRARY.impl(f"{name}_{kind}", kernel, "CompositeExplicitAutograd")
        LIBRARY.impl(f"{name}_{kind}", _differentiable(op, apply), "Autograd")
        torch.library.register_fake(f"fastcl::{name}_{kind}", fake, lib=LIBRARY)
