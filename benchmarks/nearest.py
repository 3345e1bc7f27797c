"""Suite ``topk``: the k largest inner products of queries with keys, compared with torch.topk of all and with faiss."""

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
from benchmarks.providers import _why_not
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.topk.op import SEARCHES

SUITE, PAGE = "topk", "topk.md"
EAGER, FAISS = "eager", "faiss-cpu, flat"
NOTE = (
    "Unit rows, float32. Error: relative error of the values, against float64 rows. faiss: `IndexFlatIP.search`, with "
    "its keys added beforehand, and with as many threads as torch."
)


@dataclass(frozen=True)
class Case:
    """The k best of M keys for N queries, all of dimension D."""

    n: int
    m: int
    k: int
    d: int = 128

    @property
    def name(self) -> str:
        return f"{self.n} x {self.m}, D={self.d}, top {self.k}"

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        x, y = (F.normalize(torch.randn(size, self.d, generator=g), dim=1).to(device) for size in (self.n, self.m))
        return x, y


CASES = (Case(64, 10**6, 20), Case(1, 10**6, 20), Case(4096, 65536, 1), Case(1024, 65536, 20), Case(1024, 65536, 200))
QUICK = (Case(64, 50_000, 20), Case(512, 8192, 1))

Search = Callable[[], Tensor]  # values [N, k]


def _fastcl(backend: str, x: Tensor, y: Tensor, k: int) -> Tensor:
    with fastcl.use_backend(backend):
        return fastcl.topk_similarity(x, y, k)[0]


def _eager(x: Tensor, y: Tensor, k: int) -> Tensor:
    return torch.topk(x @ y.T, k).values


def _faiss(x: Tensor, y: Tensor) -> Callable[[int], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(y.numpy())
    return lambda k: torch.from_numpy(index.search(x.numpy(), k)[0])


def searches(case: Case, device: torch.device) -> tuple[dict[str, tuple[Search, str]], dict[str, str]]:
    """Searches by name, each with the package that gives its version; and missing providers with the reason."""
    x, y = case.rows(device)
    found: dict[str, tuple[Search, str]] = {
        f"fastcl {backend}": (partial(_fastcl, backend, x, y, case.k), "fastcl")
        for backend in SEARCHES
        if backend != "reference" and {"cpu": "cpu", "triton": "cuda"}.get(backend, device.type) == device.type
    }
    found[EAGER] = partial(_eager, x, y, case.k), "torch"
    missing = {}
    reason = _why_not("faiss") if device.type == "cpu" else "computes on cpu"
    if reason is None:
        found[FAISS] = partial(_faiss(x, y), case.k), "faiss-cpu"
    else:
        missing[FAISS] = reason
    return found, missing


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    found, missing = searches(case, device)
    x, y = case.rows(device)
    truth = torch.cat([torch.topk(part.double() @ y.double().T, case.k).values for part in x.split(64)])

    def error(search: Search) -> float:
        return float((search().double() - truth).norm() / truth.norm())

    contestants = {
        name: Contestant(search, partial(error, search), package) for name, (search, package) in found.items()
    }
    return side_by_side.measure(SUITE, case.name, contestants, missing, device, 1e-5, **effort)


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    rows = [
        row
        for case in (QUICK if quick else CASES)
        if only in case.name
        for row in measure(case, device, rounds=(3, 15), seconds=0.5 if quick else 2.0)
    ]
    side_by_side.write(folder, SUITE, rows, side_by_side.page("Top-k", rows, circumstances, NOTE))
    return rows
