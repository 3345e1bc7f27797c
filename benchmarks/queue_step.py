"""Suite ``queue``: a MoCo step with its queue: loss, the queries' gradient, and enqueueing of the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from benchmarks import side_by_side
from benchmarks.cases import TEMPERATURE
from benchmarks.providers import _DEVICE_OF_BACKEND, _why_not
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.backends.choose import AVAILABLE

SUITE, PAGE = "queue", "queue.md"
EAGER, LIGHTLY = "eager", "lightly's memory bank"
NOTE = (
    "float32. A step computes the loss of queries and keys against the stored rows and the queries' gradient, and "
    "enqueues the keys. Error: the relative error of the loss or of the gradient, whichever is larger, against float64."
)


@dataclass(frozen=True)
class Case:
    """N queries, each with its key, and M stored rows of dimension D."""

    n: int
    m: int
    d: int = 128

    @property
    def name(self) -> str:
        return f"{self.n} x {self.m}, D={self.d}"

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, and stored rows, which are unit rows."""
        g = torch.Generator(device).manual_seed(0)
        sizes = (self.n, self.n, self.m)
        query, key, stored = (torch.randn(size, self.d, generator=g, device=device) for size in sizes)
        return query.requires_grad_(), key, F.normalize(stored, dim=1)


CASES = (Case(64, 1024), Case(64, 65536), Case(256, 65536), Case(4096, 65536))
QUICK = (Case(256, 8192),)

Step = Callable[[], tuple[Tensor, Tensor]]  # loss and gradient


def formula(query: Tensor, key: Tensor, stored: Tensor) -> Tensor:
    """The formula of MoCo's own code."""
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ stored.T], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def _with_gradient(loss: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, query)
    return loss.detach(), gradient


def _fastcl(backend: str, query: Tensor, key: Tensor, stored: Tensor) -> Step:
    queue = fastcl.MemoryQueue(len(stored), stored.shape[1]).to(stored.device)
    queue.enqueue(stored)
    criterion = fastcl.MoCoLoss(TEMPERATURE)

    def step() -> tuple[Tensor, Tensor]:
        with fastcl.use_backend(backend):
            result = _with_gradient(criterion(query, key, queue), query)
        queue.enqueue(key)
        return result

    return step


def _eager(query: Tensor, key: Tensor, stored: Tensor) -> Step:
    queue, place = stored.clone(), 0

    def step() -> tuple[Tensor, Tensor]:
        nonlocal place
        result = _with_gradient(formula(query, key, queue.clone()), query)
        queue[place : place + len(key)] = F.normalize(key, dim=1)
        place = (place + len(key)) % len(queue)
        return result

    return step


def _lightly(query: Tensor, key: Tensor, stored: Tensor) -> Step:
    from lightly.loss.ntx_ent_loss import NTXentLoss

    criterion = NTXentLoss(TEMPERATURE, memory_bank_size=(len(stored), stored.shape[1])).to(stored.device)
    bank = getattr(criterion, "memory_bank", criterion)
    bank.bank.copy_(stored if bank.bank.shape == stored.shape else stored.T)  # the layout depends on lightly's version
    return lambda: _with_gradient(criterion(query, key), query)


def steps(case: Case, device: torch.device) -> tuple[dict[str, tuple[Callable[..., Step], str]], dict[str, str]]:
    """Factories of steps by name, each with the package that gives its version; and missing providers with reasons."""
    found: dict[str, tuple[Callable[..., Step], str]] = {
        f"fastcl {backend}": (partial(_fastcl, backend), "fastcl")
        for backend in AVAILABLE
        if backend != "reference" and _DEVICE_OF_BACKEND.get(backend, device.type) == device.type
    }
    found[EAGER] = _eager, "torch"
    reason = _why_not("lightly.loss.ntx_ent_loss")
    if reason is None:
        found[LIGHTLY] = _lightly, "lightly"
    return found, {} if reason is None else {LIGHTLY: reason}


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    found, missing = steps(case, device)
    query, key, stored = case.rows(device)
    wide = query.detach().double().requires_grad_()
    truth = _with_gradient(formula(wide, key.double(), stored.double()), wide)

    def error(make: Callable[..., Step]) -> float:  # with a new queue
        pairs = zip(make(query, key, stored)(), truth, strict=True)
        return max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)

    contestants = {
        name: Contestant(make(query, key, stored), partial(error, make), package)
        for name, (make, package) in found.items()
    }
    return side_by_side.measure(SUITE, case.name, contestants, missing, device, 1e-4, **effort)


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    cases = QUICK if quick else CASES
    return side_by_side.run(
        cases, only, measure, device, quick, folder, SUITE, "A step with a queue", circumstances, NOTE
    )
