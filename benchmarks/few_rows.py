"""Suite ``few``: losses of few rows, whose time is that of many small operators and of Python."""

from __future__ import annotations

import math
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
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.backends.choose import AVAILABLE

SUITE, PAGE = "few", "few.md"
EAGER, COMPILED = "eager", "torch.compile"
CLASSES, PROTOTYPES = 100, 300
NOTE = (
    f"float32, D = 128. ArcFace: {CLASSES} classes, whose vectors get a gradient too. Multi-similarity: 10 classes. "
    f"SwAV: two crops, with scores of {PROTOTYPES} prototypes; three iterations of Sinkhorn. Eager: the formula as "
    "papers and tutorials have it. A step computes the loss and the gradients of all leaves. Error: the largest "
    "relative error of loss and gradients, against float64."
)


@dataclass(frozen=True)
class Case:
    """loss: a key of LOSSES, of n rows."""

    loss: str
    n: int
    d: int = 128

    @property
    def name(self) -> str:
        return f"{self.loss}, N={self.n}"

    def arguments(self, device: torch.device) -> list[Tensor]:
        """The leaves, then the labels of losses that have some."""
        g = torch.Generator(device).manual_seed(0)

        def rows(n: int, d: int) -> Tensor:
            return torch.randn(n, d, generator=g, device=device)

        if self.loss == "SwAV":
            return [F.normalize(rows(self.n, PROTOTYPES), dim=1).requires_grad_() for _ in range(2)]
        given = [rows(self.n, self.d).requires_grad_()]
        if self.loss in ("VICReg", "Barlow Twins", "hypersphere"):
            given.append((given[0].detach() + rows(self.n, self.d)).requires_grad_())
        if self.loss == "ArcFace":
            given.append(rows(CLASSES, self.d).requires_grad_())
        if self.loss in ("ArcFace", "multi-similarity"):
            classes = CLASSES if self.loss == "ArcFace" else 10
            given.append(torch.randint(0, classes, (self.n,), generator=g, device=device))
        return given


# The formulas as a competent user writes them.


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    n, d = a.shape
    loss = 25 * F.mse_loss(a, b)
    for x in (a, b):
        x = x - x.mean(0)
        covariance = x.T @ x / (n - 1)
        loss = loss + 25 * F.relu(1 - torch.sqrt(x.var(0) + 1e-4)).mean() / 2
        loss = loss + (covariance.pow(2).sum() - covariance.diagonal().pow(2).sum()) / d
    return loss


def barlow_twins(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    a, b = ((x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5) for x in (a, b))
    c = a.T @ b / n
    return (c.diagonal() - 1).pow(2).sum() + 5e-3 * (c.pow(2).sum() - c.diagonal().pow(2).sum())


def koleo(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return -torch.log(torch.linalg.vector_norm(x - x[nearest], dim=1) + 1e-8).mean()


def hypersphere(a: Tensor, b: Tensor) -> Tensor:
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    uniform = [torch.pdist(x).pow(2).neg().exp().mean().log() for x in (a, b)]
    return (a - b).pow(2).sum(1).mean() + (uniform[0] + uniform[1]) / 2


def arcface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    cosines = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    moved = torch.cos(torch.acos(cosines.clamp(-1 + 1e-7, 1 - 1e-7)) + math.radians(28.6))
    own = F.one_hot(labels, len(w)).bool()
    return F.cross_entropy(64 * torch.where(own, moved, cosines), labels)


def multi_similarity(x: Tensor, labels: Tensor) -> Tensor:
    x = F.normalize(x, dim=1)
    cosines, same = x @ x.T - 0.5, labels[:, None] == labels
    positives = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    pull = torch.log1p((torch.exp(-2 * cosines) * positives).sum(1)) / 2
    push = torch.log1p((torch.exp(50 * cosines) * ~same).sum(1)) / 50
    return (pull + push).mean()


def swav(a: Tensor, b: Tensor) -> Tensor:
    def targets(scores: Tensor) -> Tensor:
        q = torch.exp(scores / 0.05).T
        q = q / q.sum()
        k, n = q.shape
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / k
            q = q / q.sum(0, keepdim=True) / n
        return (q * n).T

    with torch.no_grad():
        p, q = targets(a), targets(b)
    return -((p * F.log_softmax(b / 0.1, 1)).sum(1).mean() + (q * F.log_softmax(a / 0.1, 1)).sum(1).mean()) / 2


Loss = Callable[..., Tensor]
_swav = fastcl.SwAVLoss()
LOSSES: dict[str, tuple[Loss, Loss]] = {  # ours, and the formula
    "VICReg": (fastcl.VICRegLoss(), vicreg),
    "Barlow Twins": (fastcl.BarlowTwinsLoss(), barlow_twins),
    "KoLeo": (fastcl.KoLeoLoss(), koleo),
    "hypersphere": (fastcl.HypersphereLoss(), hypersphere),
    "ArcFace": (lambda x, w, labels: fastcl.functional.arcface_loss(x, labels, w), arcface),
    "multi-similarity": (fastcl.MultiSimilarityLoss(), multi_similarity),
    "SwAV": (lambda a, b: _swav([a, b]), swav),
}
CASES = tuple(Case(loss, n) for loss in LOSSES for n in (64, 256))
QUICK = (Case("KoLeo", 64), Case("SwAV", 256))


def losses(case: Case, device: torch.device) -> dict[str, Loss]:
    """By provider its loss."""
    ours, plain = LOSSES[case.loss]
    backend = "cpu" if device.type == "cpu" and "cpu" in AVAILABLE else "triton" if device.type == "cuda" else "chunked"
    return {f"fastcl {backend}": ours, EAGER: plain, COMPILED: torch.compile(plain, dynamic=False)}


def _step(loss: Loss, given: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*given)
    return value.detach(), *torch.autograd.grad(value, [x for x in given if x.requires_grad])


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    torch.compiler.reset()
    given = case.arguments(device)
    wide = [x.detach().double().requires_grad_() if x.requires_grad else x for x in given]
    truth = _step(LOSSES[case.loss][1], wide)

    def error(loss: Loss) -> float:
        pairs = zip(_step(loss, given), truth, strict=True)
        return max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)

    contestants = {
        name: Contestant(partial(_step, loss, given), partial(error, loss), "fastcl" if "fastcl" in name else "torch")
        for name, loss in losses(case, device).items()
    }
    return side_by_side.measure(SUITE, case.name, contestants, {}, device, 1e-4, **effort)


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    cases = QUICK if quick else CASES
    return side_by_side.run(cases, only, measure, device, quick, folder, SUITE, "Few rows", circumstances, NOTE)
