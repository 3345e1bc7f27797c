"""Chooses the backend of a call; records which backends are available and why others are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ...checks import shown
from . import cuda_runtime, native, triton_launch

AVAILABLE: dict[str, str] = {"reference": "", "chunked": ""}
"""The available backends, each with a description."""

MISSING: dict[str, str] = {}
"""The missing backends, each with the reason."""


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
    """Selects the backend inside a ``with`` block, for the current thread or task.

    Args:
        name: ``"reference"`` (the specification in code; stores every logit), ``"chunked"`` (plain PyTorch in blocks of
            rows), ``"cpu"`` (C++ on x86-64 and ARM), ``"triton"`` or ``"cuda"`` (GPUs; float64 rows use ``"chunked"``).
            With ``"cuda"``, ``return_stats`` takes a second sweep by ``"chunked"``, and soft assignments are an error.
            The environment variable ``FASTCL_BACKEND`` selects a backend for the process; this context overrides it.

    A backward runs on the backend of its forward. A function under ``torch.compile`` keeps the backend with which it
    was traced.

    Raises:
        ValueError: if the backend does not exist or is not available; the message says why.
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
    """The backend that computes a family of operators for rows on `device` with sums in `dtype`.

    It is the selected backend, else the fastest available one; or its replacement by `_stand_in`.

    family: one of `FAMILIES`.
    """
    if device.type == "cpu" and (wrong := native.wrong_cap()):
        raise ValueError(wrong)
    return _stand_in(_asked_for(device, family) or _fastest(device, dtype, family), device, dtype, family)


def chooses_cpu() -> bool:
    """Whether `choose_backend` chooses ``cpu`` for tensors on the CPU, of every dtype and family.

    It takes a third of the time, and is not to be traced.
    """
    chosen = _chosen.get()
    if chosen is None and "cpu" in AVAILABLE:
        chosen = native.native_module().environment("FASTCL_BACKEND") or "cpu"
    return chosen == "cpu"


def _asked_for(device: torch.device, family: str) -> str | None:
    """The backend that `use_backend` or ``FASTCL_BACKEND`` names; ValueError if it lacks `device` or the family."""
    chosen, source = _chosen.get(), "use_backend"
    if chosen is None and os.environ.get("FASTCL_BACKEND"):
        source = "FASTCL_BACKEND"
        chosen = _available(os.environ[source], source)
    if chosen is not None and (reason := unsupported_reason(chosen, device)):
        raise ValueError(f"{source}: {chosen!r} {reason}")
    if chosen in LACKING and family in LACKING[chosen]:
        others = ", ".join(repr(name) for name in REPLACEMENTS[chosen] if name in AVAILABLE)
        raise ValueError(f"{source}: expected one of {others} for {FAMILIES[family]}, which {chosen!r} lacks")
    return chosen


def _fastest(device: torch.device, dtype: torch.dtype, family: str) -> str:
    if device.type == "cpu":
        return "cpu" if "cpu" in AVAILABLE else "chunked"
    if "cuda" in AVAILABLE and dtype != torch.float64 and cuda_runtime.measured_faster(device, family):
        return "cuda"
    here = device.type == "cuda" and "triton" in AVAILABLE and not unsupported_reason("triton", device)
    return "triton" if here else "chunked"


# All fallbacks are decided here, except for empty sets of rows, which every backend passes to `chunked`.
# docs/internals.md has the table.
FLOAT64 = ("reference", "chunked", "cpu")  # the backends that compute float64; on a GPU `chunked` does
MOST_NEIGHBOURS = 256  # largest k of top-k for which the GPU kernels keep a query's best candidates on chip


FAMILIES = {
    "contrastive_stats": "contrastive statistics",
    "pair_rules": "contrastive statistics with tags, groups, a guide or duplicates",
    "soft_assignments": "soft assignments",
    "pair_sums": "sums over pairs",
    "pair_distances": "sums of distances over pairs",
    "prototypes": "prototype losses",
    "sinkhorn": "Sinkhorn",
    "topk": "top-k",
}

# The families that a backend lacks. By default another backend computes them; if the backend is named, it is an error.
LACKING: dict[str, frozenset[str]] = {
    "cuda": frozenset({"pair_rules", "soft_assignments", "pair_distances", "prototypes"}),
}

# Backends that replace one which lacks a family or a dtype, best first.
REPLACEMENTS = {"cuda": ("triton", "chunked"), "triton": ("chunked",)}

# Which backend's second sweep a backend takes for `return_stats`. Those that are not here need none.
SECOND_SWEEP = {"triton": "triton", "cuda": "chunked"}


def computes(name: str, dtype: torch.dtype, family: str) -> bool:
    """Whether a backend itself computes a family with sums in `dtype`."""
    lacking = name in LACKING and family in LACKING[name]
    return (dtype != torch.float64 or name in FLOAT64) and not lacking


def _stand_in(name: str, device: torch.device, dtype: torch.dtype, family: str) -> str:
    """`name`, or the backend that replaces it if it lacks the family or dtype."""
    if computes(name, dtype, family):
        return name
    usable = [other for other in REPLACEMENTS[name] if other in AVAILABLE and not unsupported_reason(other, device)]
    return next(other for other in usable if computes(other, dtype, family))


def for_neighbours(name: str, k: int) -> str:
    """`name`, the backend chosen for top-k, or its replacement for a large k."""
    return "chunked" if k > MOST_NEIGHBOURS and name in ("triton", "cuda") else name


def unsupported_reason(name: str, device: torch.device) -> str:
    """Why an available backend does not support tensors on `device`; empty if it does."""
    if name == "cpu":
        return "" if device.type == "cpu" else f"takes tensors on the CPU, got tensors on {device}"
    if name == "triton":
        return triton_launch.unsupported_reason(device)
    return cuda_runtime.unsupported_reason(device) if name == "cuda" else ""


# Tracing cannot read context variables or the environment, so the choice becomes a constant of the graph. This mark
# has the effect of torch.compiler.assume_constant_result, which imports the whole compiler and takes seconds.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
