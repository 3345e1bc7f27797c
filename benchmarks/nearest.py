"""Suite ``topk``: the k largest inner products of queries with keys, compared with torch.topk of all and with faiss."""

from __future__ import annotations

import importlib
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
from benchmarks.providers import _DEVICE_OF_BACKEND, _why_not
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.backends.choose import AVAILABLE
from fastcl.ops.topk.op import SEARCHES

SUITE, PAGE = "topk", "topk.md"
EAGER, FAISS, FAISS_GPU = "eager", "faiss-cpu, flat", "faiss-gpu, flat"
BLOCK = 2**31  # products of a block of eager's queries
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
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        rounded = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.n} x {self.m}, D={self.d}, top {self.k}{rounded}"

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Queries and keys, drawn on the device."""
        g = torch.Generator(device).manual_seed(0)
        return self.normal(self.n, g), self.normal(self.m, g)

    def normal(self, size: int, g: torch.Generator) -> Tensor:
        """Unit rows."""
        rows = torch.randn(size, self.d, generator=g, device=g.device)
        return F.normalize(rows, dim=1, out=rows).to(self.dtype)


CASES = (Case(64, 10**6, 20), Case(1, 10**6, 20), Case(4096, 65536, 1), Case(1024, 65536, 20), Case(1024, 65536, 200))
QUICK = (Case(64, 50_000, 20), Case(512, 8192, 1))

Search = Callable[[Tensor], Tensor]  # queries -> values [N, k]


def _fastcl(backend: str, y: Tensor, k: int) -> Search:
    def search(x: Tensor) -> Tensor:
        with fastcl.use_backend(backend):
            return fastcl.topk_similarity(x, y, k)[0]

    return search


def _eager(y: Tensor, k: int) -> Search:
    def search(x: Tensor) -> Tensor:
        blocks = x.split(max(BLOCK // len(y), 1))
        return torch.cat([torch.topk(block @ y.T, k).values for block in blocks])

    return search


def _faiss(y: Tensor, k: int) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(y.shape[1])
    index.add(y.numpy())
    return lambda x: torch.from_numpy(index.search(x.numpy(), k)[0])


def _faiss_gpu(y: Tensor, k: int) -> Search:
    import faiss
    import faiss.contrib.torch_utils  # lets an index take tensors

    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), y.shape[1])
    index.add(y.float())

    def search(x: Tensor) -> Tensor:
        values: Tensor = index.search(x.float(), k)[0]
        return values

    return search


def searches(device: torch.device) -> tuple[dict[str, tuple[Callable[[Tensor, int], Search], str]], dict[str, str]]:
    """What prepares a search for keys and k, by name, each with its package; and missing providers with the reason."""
    found: dict[str, tuple[Callable[[Tensor, int], Search], str]] = {
        f"fastcl {backend}": (partial(_fastcl, backend), "fastcl")
        for backend in SEARCHES
        if backend in AVAILABLE
        and backend != "reference"
        and _DEVICE_OF_BACKEND.get(backend, device.type) == device.type
    }
    found[EAGER] = _eager, "torch"
    missing, reason = {}, _why_not("faiss")
    name, make = (FAISS, _faiss) if device.type == "cpu" else (FAISS_GPU, _faiss_gpu)
    if (
        reason is None
        and device.type != "cpu"
        and not hasattr(importlib.import_module("faiss"), "StandardGpuResources")
    ):
        reason = "the installed faiss is built without GPUs"
    if reason is None:
        found[name] = make, "faiss-cpu" if device.type == "cpu" else "faiss-gpu"
    else:
        missing[name] = reason
    return found, missing


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    found, missing = searches(device)
    x, y = case.rows(device)
    truth = torch.cat([torch.topk(part.double() @ y.double().T, case.k).values for part in x.split(64)])

    def error(step: Callable[[], Tensor]) -> float:
        return float((step().double() - truth).norm() / truth.norm())

    steps = {name: (partial(make(y, case.k), x), package) for name, (make, package) in found.items()}
    contestants = {name: Contestant(step, partial(error, step), package) for name, (step, package) in steps.items()}
    return side_by_side.measure(SUITE, case.name, contestants, missing, device, 1e-5, **effort)


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    cases = QUICK if quick else CASES
    return side_by_side.run(cases, only, measure, device, quick, folder, SUITE, "Top-k", circumstances, NOTE)
