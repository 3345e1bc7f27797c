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
            return "cpu" if "cpu" in AVAILABLE else "chunked"
        if "cuda" in AVAILABLE and dtype != torch.float64 and cuda_runtime.measured_faster(device, op):
            return "cuda"
        here = device.type == "cuda" and "triton" in AVAILABLE and dtype != torch.float64
        return "triton" if here and not triton_launch.refusal(device) else "chunked"
    if chosen == "cpu" and device.type != "cpu":
        raise ValueError(f"{source}: 'cpu' takes tensors on the CPU, got tensors on {device}")
    if chosen == "triton" and (reason := triton_launch.refusal(device)):
        raise ValueError(f"{source}: 'triton' {reason}")
    if chosen == "cuda" and (reason := cuda_runtime.refusal(device)):
        raise ValueError(f"{source}: 'cuda' {reason}")
    return chosen


# Tracing cannot look into context variables or the environment: what they say then becomes part of the graph. This is
# torch.compiler.assume_constant_result, which would import the whole compiler with fastcl, for seconds.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
