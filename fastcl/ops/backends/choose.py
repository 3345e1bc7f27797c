"""The one chooser: which backends are here, why others are not, and which one takes a call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ...checks import shown
from . import cuda_runtime, native, triton_launch

AVAILABLE: dict[str, str] = {"reference": "", "chunked": ""}
"""The backends that are here, and what is known of each."""

MISSING: dict[str, str] = {}
"""Those that are not, and why."""


def _look() -> None:
    engine, reason = native.engine()
    found = {
        "cpu": (engine is not None, reason),
        "triton": triton_launch.availability(),
        "cuda": cuda_runtime.availability(),
    }
    for name, (here, known) in found.items():
        (AVAILABLE if here else MISSING)[name] = known


_look()

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
        raise TypeError(f"{source}: expected the name of a backend ({', '.join(AVAILABLE)}), got {shown(name)}")
    if name in AVAILABLE:
        return name
    options = ", ".join(map(repr, AVAILABLE))
    reason = f", which is not available here: {MISSING[name]}" if name in MISSING else ""
    raise ValueError(f"{source}: expected one of {options}, got {name!r}{reason}")


def choose_backend(device: torch.device, dtype: torch.dtype, family: str = "contrastive_stats") -> str:
    """The backend that computes an operator's family for rows on `device` whose sums have `dtype`.

    It is the one that was asked for, else the fastest one here; or what stands in for it by `_stand_in`.

    family: ``"contrastive_stats"``, ``"soft_assignments"``, ``"sinkhorn"`` or ``"topk"``.
    """
    if device.type == "cpu" and (wrong := native.wrong_cap()):
        raise ValueError(wrong)
    return _stand_in(_asked_for(device) or _fastest(device, dtype, family), device, dtype, family)


def _asked_for(device: torch.device) -> str | None:
    """The backend that `use_backend` or ``FASTCL_BACKEND`` names; ValueError if it does not take `device`."""
    chosen, source = _chosen.get(), "use_backend"
    if chosen is None and os.environ.get("FASTCL_BACKEND"):
        source = "FASTCL_BACKEND"
        chosen = _available(os.environ[source], source)
    if chosen is not None and (reason := unsupported_reason(chosen, device)):
        raise ValueError(f"{source}: {chosen!r} {reason}")
    return chosen


def _fastest(device: torch.device, dtype: torch.dtype, family: str) -> str:
    if device.type == "cpu":
        return "cpu" if "cpu" in AVAILABLE else "chunked"
    if "cuda" in AVAILABLE and dtype != torch.float64 and cuda_runtime.measured_faster(device, family):
        return "cuda"
    here = device.type == "cuda" and "triton" in AVAILABLE and not unsupported_reason("triton", device)
    return "triton" if here else "chunked"


# What falls back to what is decided here and nowhere else, but for sets without rows, which every backend leaves to
# `chunked`. docs/internals.md has the table.
FLOAT64 = ("reference", "chunked", "cpu")  # the backends that compute it; on a GPU `chunked` does
MOST_NEIGHBOURS = 256  # k of top-k, up to which the GPU's kernels keep a row's best in registers


def _stand_in(name: str, device: torch.device, dtype: torch.dtype, family: str) -> str:
    """`name`, or the backend that computes in its place what it does not have."""
    if name == "cuda" and family == "soft_assignments":
        there = "triton" in AVAILABLE and not unsupported_reason("triton", device)
        name = "triton" if there else "chunked"
    return "chunked" if dtype == torch.float64 and name not in FLOAT64 else name


def for_neighbours(name: str, k: int) -> str:
    """The backend that finds k neighbours where `name` is chosen for top-k."""
    return "chunked" if k > MOST_NEIGHBOURS and name in ("triton", "cuda") else name


def unsupported_reason(name: str, device: torch.device) -> str:
    """Why a backend that is here does not take tensors on `device`; empty if it does."""
    if name == "cpu":
        return "" if device.type == "cpu" else f"takes tensors on the CPU, got tensors on {device}"
    if name == "triton":
        return triton_launch.unsupported_reason(device)
    return cuda_runtime.unsupported_reason(device) if name == "cuda" else ""


# Tracing cannot look into context variables or the environment: what they say then becomes part of the graph. This is
# torch.compiler.assume_constant_result, which would import the whole compiler with fastcl, for seconds.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
