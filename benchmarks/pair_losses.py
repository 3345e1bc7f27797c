"""Suite ``pairs``: losses that are sums over pairs, with the gradient of the embeddings and of what is learned."""

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
from benchmarks.providers import _DEVICE_OF_BACKEND, _why_not
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.backends.choose import AVAILABLE

SUITE, PAGE = "pairs", "pairs.md"
EAGER, COMPILED, OPEN_CLIP, METRIC_LEARNING = "eager", "torch.compile", "open_clip", "pytorch-metric-learning"
SCALE, BIAS = 10.0, -10.0  # SigLIP's at the start of its training
NOTE = (
    "float32. A step computes the loss and the gradients of all embeddings, for SigLIP also of scale and bias. SigLIP: "
    "two sets of N rows. NT-Xent over pairs and contrastive: one set of N rows, 4 rows to a label. Error: the relative "
    "error of the loss or of the gradient of the first rows, whichever is larger, against float64."
)


@dataclass(frozen=True)
class Case:
    """loss: "SigLIP", "NT-Xent over pairs" or "contrastive", of N rows of dimension D."""

    loss: str
    n: int
    d: int = 128
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", {self.dtype_name}"
        return f"{self.loss}, {self.n} x {self.n}, D={self.d}{dtype}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """The leaves: rows, and for SigLIP the other rows, scale and bias, which are float32."""
        g = torch.Generator(device).manual_seed(seed)
        count = 2 if self.loss == "SigLIP" else 1
        rows = [torch.randn(self.n, self.d, generator=g, device=device) for _ in range(count)]
        numbers = [torch.tensor(x, device=device) for x in (SCALE, BIAS)] if count == 2 else []
        leaves = [*(F.normalize(x, dim=1).to(self.dtype) for x in rows), *numbers]
        return [leaf.requires_grad_() for leaf in leaves]

    def labels(self, device: torch.device) -> Tensor:
        return torch.arange(self.n, device=device) % max(self.n // 4, 1)


CASES = (
    *(Case("SigLIP", n) for n in (256, 1024, 4096, 8192)),
    Case("SigLIP", 2048, 512),
    *(Case(loss, n) for loss in ("NT-Xent over pairs", "contrastive") for n in (512, 2048)),
)
QUICK = (Case("SigLIP", 256), Case("NT-Xent over pairs", 256), Case("contrastive", 256))

Loss = Callable[..., Tensor]


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's formula. Rows of 16 bits are multiplied as they are, as under autocast; the rest is float32."""
    logits = scale * (image @ text.T) + bias
    labels = 2 * torch.eye(len(image), device=image.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def _masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def ntxent(labels: Tensor, x: Tensor) -> Tensor:
    """The mean over pairs of an anchor and a positive, each against the anchor's negatives."""
    positive, negative = _masks(labels)
    x = F.normalize(x, dim=1)
    s = SCALE * x @ x.T
    bottom = torch.logsumexp(s.masked_fill(~negative, -torch.inf), 1, keepdim=True)
    return torch.where(positive, F.softplus(bottom - s), 0).sum() / positive.sum()


def contrastive(labels: Tensor, x: Tensor) -> Tensor:
    """The mean over positive pairs and the mean over negative pairs, of those whose loss is not 0."""
    x = F.normalize(x, dim=1)
    d = torch.cdist(x, x)
    total = x.new_zeros(())
    for mask, each in zip(_masks(labels), (d, (1 - d).relu()), strict=True):
        each = torch.where(mask, each, 0)
        total = total + each.sum() / (each > 0).sum().clamp(min=1)
    return total


def _eager(case: Case, device: torch.device) -> Loss:
    if case.loss == "SigLIP":
        return siglip
    return partial(ntxent if case.loss == "NT-Xent over pairs" else contrastive, case.labels(device))


def _compiled(case: Case, device: torch.device) -> Loss:
    return torch.compile(_eager(case, device))


def _fastcl(backend: str, case: Case, device: torch.device) -> Loss:
    labels = case.labels(device)
    if case.loss == "SigLIP":
        criterion: Loss = fastcl.SigLipLoss()
    elif case.loss == "contrastive":
        criterion = partial(_labelled, fastcl.PairContrastiveLoss(), labels)
    else:
        criterion = partial(_labelled, fastcl.ClusterInfoNCE(1 / SCALE, form="pairs"), labels)

    def loss(*leaves: Tensor) -> Tensor:
        with fastcl.use_backend(backend):
            return criterion(*leaves)

    return loss


def _open_clip(case: Case, device: torch.device) -> Loss:
    from open_clip.loss import SigLipLoss

    criterion: Loss = SigLipLoss()
    return criterion


def _metric_learning(case: Case, device: torch.device) -> Loss:
    from pytorch_metric_learning import losses

    criterion = losses.ContrastiveLoss() if case.loss == "contrastive" else losses.NTXentLoss(1 / SCALE)
    return partial(_labelled, criterion, case.labels(device))


def _labelled(criterion: Loss, labels: Tensor, x: Tensor) -> Tensor:
    return criterion(x, labels)


def losses(case: Case, device: torch.device) -> tuple[dict[str, tuple[Callable[..., Loss], str]], dict[str, str]]:
    """Factories of losses by name, each with the package that gives its version; and missing providers with reasons."""
    found: dict[str, tuple[Callable[..., Loss], str]] = {
        f"fastcl {backend}": (partial(_fastcl, backend), "fastcl")
        for backend in AVAILABLE
        if backend != "reference" and _DEVICE_OF_BACKEND.get(backend, device.type) == device.type
    }
    found |= {EAGER: (_eager, "torch"), COMPILED: (_compiled, "torch")}
    name, module, make, package = (
        (OPEN_CLIP, "open_clip.loss", _open_clip, "open_clip_torch")
        if case.loss == "SigLIP"
        else (METRIC_LEARNING, "pytorch_metric_learning.losses", _metric_learning, METRIC_LEARNING)
    )
    reason = _why_not(module)
    if reason is None:
        found[name] = make, package
    return found, {} if reason is None else {name: reason}


def _step(loss: Loss, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the first rows."""
    value = loss(*leaves)
    gradient, *_ = torch.autograd.grad(value, leaves)
    return value.detach(), gradient


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    torch.compiler.reset()
    found, missing = losses(case, device)
    leaves = case.inputs(device)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = _step(_eager(case, device), wide)

    def error(loss: Loss) -> float:
        pairs = zip(_step(loss, leaves), truth, strict=True)
        return max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)

    contestants = {}
    for name, (make, package) in found.items():
        loss = make(case, device)
        contestants[name] = Contestant(partial(_step, loss, leaves), partial(error, loss), package)
    return side_by_side.measure(SUITE, case.name, contestants, missing, device, 1e-4, **effort)


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    cases = QUICK if quick else CASES
    return side_by_side.run(cases, only, measure, device, quick, folder, SUITE, "Losses of pairs", circumstances, NOTE)
