"""Suite ``kmeans``: iterations of k-means from the same centroids, compared with scikit-learn and eager PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastcl
from benchmarks import side_by_side
from benchmarks.providers import _DEVICE_OF_BACKEND, _why_not
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.backends.choose import AVAILABLE
from fastcl.ops.topk.op import SEARCHES

SUITE, PAGE = "kmeans", "kmeans.md"
EAGER, SKLEARN = "eager", "scikit-learn, Lloyd"
TOLERANCE = 1e-2  # of the inertia; roundings decide which of two nearly equal clusters a row joins
BLOCK = 2**24  # products of a block of eager's rows
NOTE = (
    "Rows around k centres, float32; every provider starts from the same k rows and takes the same iterations. fastcl "
    "leaves out rows whose centroid cannot have changed. Error: relative difference of the inertia from that of the "
    "same iterations in float64. scikit-learn: `KMeans(k, init=centroids, n_init=1, max_iter=iterations, tol=0, "
    'algorithm="lloyd")`, threads as it chooses; here its other algorithm, Elkan\'s, takes longer.'
)


@dataclass(frozen=True)
class Case:
    """`n_iters` iterations for N rows of dimension D and k clusters."""

    n: int
    k: int
    d: int = 128
    n_iters: int = 10

    @property
    def name(self) -> str:
        return f"{self.n} x {self.d}, k={self.k}, {self.n_iters} iterations"

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows, and the centroids to start from."""
        g = torch.Generator(device).manual_seed(0)
        centres = torch.randn(self.k, self.d, generator=g, device=device)
        own = torch.randint(0, self.k, (self.n,), generator=g, device=device)
        rows = centres[own] + torch.randn(self.n, self.d, generator=g, device=device)
        return rows, rows[torch.randperm(self.n, generator=g, device=device)[: self.k]]


CASES = (Case(100_000, 1000), Case(20_000, 100, 256))
QUICK = (Case(5000, 50, 64),)

Cluster = Callable[[], float]  # runs all iterations -> inertia


def _fastcl(backend: str, case: Case, rows: Tensor, init: Tensor) -> Cluster:
    def run() -> float:
        with fastcl.use_backend(backend):
            return fastcl.kmeans(rows, case.k, init=init, n_iters=case.n_iters, tol=0).inertia

    return run


def lloyd(case: Case, rows: Tensor, init: Tensor) -> float:
    """The iterations in plain PyTorch; clusters without rows keep their centroids."""
    centres = init.to(rows.dtype)

    def nearest() -> Tensor:
        offsets = centres.square().sum(1) / -2
        blocks = rows.split(max(BLOCK // case.k, 1))
        return torch.cat([torch.addmm(offsets, block, centres.T).argmax(1) for block in blocks])

    for _ in range(case.n_iters):
        own = nearest()
        sums = torch.zeros_like(centres).index_add_(0, own, rows)
        counts = own.bincount(minlength=case.k)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return float((rows - centres[nearest()]).square().sum())


def _eager(case: Case, rows: Tensor, init: Tensor) -> Cluster:
    return partial(lloyd, case, rows, init)


def _sklearn(case: Case, rows: Tensor, init: Tensor) -> Cluster:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    def run() -> float:
        model = KMeans(case.k, init=init.numpy(), n_init=1, max_iter=case.n_iters, tol=0, algorithm="lloyd")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return float(model.fit(rows.numpy()).inertia_)

    return run


def clusterings(device: torch.device) -> tuple[dict[str, tuple[Callable[..., Cluster], str]], dict[str, str]]:
    """What prepares a clustering, by name, each with its package; and missing providers with the reason."""
    found: dict[str, tuple[Callable[..., Cluster], str]] = {
        f"fastcl {backend}": (partial(_fastcl, backend), "fastcl")
        for backend in SEARCHES
        if backend in AVAILABLE
        and backend != "reference"
        and _DEVICE_OF_BACKEND.get(backend, device.type) == device.type
    }
    found[EAGER] = _eager, "torch"
    reason = _why_not("sklearn.cluster") if device.type == "cpu" else "runs on the CPU only"
    if reason is not None:
        return found, {SKLEARN: reason}
    found[SKLEARN] = _sklearn, "scikit-learn"
    return found, {}


def measure(case: Case, device: torch.device, **effort: object) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    found, missing = clusterings(device)
    rows, init = case.rows(device)
    truth = lloyd(case, rows.double(), init)

    def error(step: Cluster) -> float:
        return abs(step() - truth) / truth

    steps = {name: (make(case, rows, init), package) for name, (make, package) in found.items()}
    contestants = {name: Contestant(step, partial(error, step), package) for name, (step, package) in steps.items()}
    return side_by_side.measure(SUITE, case.name, contestants, missing, device, TOLERANCE, **effort)


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    cases = QUICK if quick else CASES
    return side_by_side.run(cases, only, measure, device, quick, folder, SUITE, "k-means", circumstances, NOTE)
