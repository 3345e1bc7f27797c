"""Suite ``rules``: self-contrast with each rule about pairs, beside the same call without it."""

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
from benchmarks.providers import _DEVICE_OF_BACKEND
from benchmarks.side_by_side import Contestant, Row
from fastcl.guide import ROUNDING
from fastcl.ops.backends.choose import AVAILABLE, computes

SUITE, PAGE = "rules", "rules.md"
EAGER, COMPILED, WITHOUT = "eager", "torch.compile", "without the rule"
TEMPERATURE, GUIDE_WIDTH, HARD, SOFT = 0.1, 64, 4, 1000
RULES = ("tags", "many tags", "groups", "duplicates", "guide", "hard negatives", "soft clusters")
NOTE = (
    "float32. A step computes ClusterInfoNCE's loss and the gradient of the embeddings. Tags: 64, three a row; many "
    "tags: 10,000, ten a row, without eager masks, which need a product of their own. Groups: N / 512 of 512 rows. "
    "Duplicates: four rows to an id, two views. Guide: rows of 64 numbers; the dense masks allow the 1e-6 that `Guide` "
    "documents. Hard negatives: 4 an anchor. Soft clusters: each row has weights over 1,000. Without the rule: the "
    "same rows with clusters of as many positives (tags) or with the same clusters. Eager has dense masks and weights."
)


@dataclass(frozen=True)
class Case:
    """rule: of RULES, over n rows of dimension d."""

    rule: str
    n: int
    d: int = 128

    @property
    def name(self) -> str:
        return f"{self.rule}, {self.n} x {self.d}"

    def arguments(self, device: torch.device) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        """The rows, the arguments with the rule, and those without."""
        g = torch.Generator().manual_seed(0)
        n = self.n
        rows = F.normalize(torch.randn(n, self.d, generator=g), dim=1)
        labels = torch.randint(0, n // 4, (n,), generator=g)
        without: dict[str, Any] = {"clusters": labels}
        if self.rule == "tags":
            given: dict[str, Any] = {"clusters": tags(n, 64, 3, g)}
            without = {"clusters": torch.randint(0, 8, (n,), generator=g)}  # about as many positives
        elif self.rule == "many tags":
            given = {"clusters": tags(n, 10_000, 10, g)}
            without = {"clusters": torch.randint(0, 100, (n,), generator=g)}
        elif self.rule == "groups":
            given = {"clusters": labels, "groups": torch.arange(n) // 512}
        elif self.rule == "duplicates":
            rows = rows.view(n // 2, 2, self.d)
            given, without = {"ids": torch.randint(0, n // 8, (n // 2,), generator=g)}, {}
        elif self.rule == "guide":
            guide = fastcl.Guide(torch.randn(n, GUIDE_WIDTH, generator=g).to(device), margin=0.1)
            given = {**without, "guide": guide}
        elif self.rule == "soft clusters":
            given = {"assignments": (3 * torch.randn(n, SOFT, generator=g)).softmax(1)}
        else:
            given = {**without, "hard_negatives": F.normalize(torch.randn(n, HARD, self.d, generator=g), dim=-1)}

        def moved(values: dict[str, Any]) -> dict[str, Any]:
            return {name: one.to(device) if isinstance(one, Tensor) else one for name, one in values.items()}

        return rows.to(device).requires_grad_(), moved(given), moved(without)


def tags(n: int, count: int, each: int, g: torch.Generator) -> Tensor:
    """Bool [n, count] with `each` tags a row."""
    found = torch.zeros(n, count, dtype=torch.bool)
    return found.scatter_(1, torch.randint(0, count, (n, each), generator=g), True)


CASES = (
    *(Case(rule, 8192) for rule in RULES if rule != "soft clusters"),
    Case("groups", 1024),
    *(Case("soft clusters", n) for n in (2048, 4096)),
)
QUICK = tuple(Case(rule, 512) for rule in RULES)

Loss = Callable[..., Tensor]


def dense(given: dict[str, Any], rows: Tensor) -> Tensor:
    """The loss with dense masks, for soft clusters with dense weights."""
    x = F.normalize(rows, dim=-1)
    n, views = len(x), x.shape[1] if x.dim() == 3 else 1
    x = x.flatten(0, -2)
    s = x @ x.T / TEMPERATURE
    admissible = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    clusters = given.get("clusters")
    weights = None
    if "assignments" in given:
        r = given["assignments"].to(x.dtype)
        weights = (r @ r.T).masked_fill(~admissible, 0)
        positive = admissible
    elif clusters is None:
        samples = torch.arange(n, device=x.device).repeat_interleave(views)
        positive = samples[:, None] == samples
        ids = given["ids"].repeat_interleave(views) if "ids" in given else samples
        admissible &= (ids[:, None] != ids) | positive
    elif clusters.dtype == torch.bool:
        bits = clusters.to(x.dtype)
        positive = bits @ bits.T > 0
    else:
        positive = clusters[:, None] == clusters
    if "groups" in given:
        admissible &= given["groups"][:, None] == given["groups"]
    positive = positive & admissible
    if "guide" in given:
        guide = F.normalize(given["guide"].embeddings.to(x.dtype), dim=1)
        cosines = guide @ guide.T
        least = cosines.masked_fill(~positive, torch.inf).amin(1, keepdim=True) - given["guide"].margin
        admissible &= positive | (cosines <= least + ROUNDING[torch.float32])
    logits = s.masked_fill(~admissible, -torch.inf)
    if "hard_negatives" in given:
        hard = torch.einsum("nd,nhd->nh", x, F.normalize(given["hard_negatives"].to(x.dtype), dim=-1)) / TEMPERATURE
        logits = torch.cat((logits, hard), 1)
    if weights is not None:
        loss: Tensor = (logits.logsumexp(1) - (weights * s).sum(1) / weights.sum(1)).mean()
        return loss
    number = positive.sum(1)
    terms = logits.logsumexp(1) - torch.where(positive, s, 0).sum(1) / number.clamp(min=1)
    counted = number > 0
    return torch.where(counted, terms, 0).sum() / counted.sum().clamp(min=1)


def _fastcl(backend: str, given: dict[str, Any]) -> Loss:
    criterion = fastcl.ClusterInfoNCE(TEMPERATURE)

    def loss(rows: Tensor) -> Tensor:
        with fastcl.use_backend(backend):
            found: Tensor = criterion(rows, **given)
        return found

    return loss


def losses(case: Case, device: torch.device) -> tuple[Tensor, dict[str, tuple[Loss, Loss]]]:
    """The rows; and by provider its loss, and the dense loss of the same arguments."""
    rows, given, without = case.arguments(device)
    usable = [
        name
        for name in AVAILABLE
        if name != "reference"
        and _DEVICE_OF_BACKEND.get(name, device.type) == device.type
        and computes(name, torch.float32, "soft_assignments" if case.rule == "soft clusters" else "pair_rules")
    ]
    truth = partial(dense, given)
    found: dict[str, tuple[Loss, Loss]] = {f"fastcl {name}": (_fastcl(name, given), truth) for name in usable}
    if usable:
        best = "cpu" if "cpu" in usable else usable[-1]
        found[f"fastcl {best}, {WITHOUT}"] = _fastcl(best, without), partial(dense, without)
    if case.rule != "many tags":
        found |= {EAGER: (truth, truth), COMPILED: (torch.compile(truth), truth)}
    return rows, found


def _step(loss: Loss, rows: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(rows)
    (gradient,) = torch.autograd.grad(value, rows)
    return value.detach(), gradient


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    torch.compiler.reset()
    rows, found = losses(case, device)
    wide = rows.detach().double().requires_grad_()
    truths: dict[bool, tuple[Tensor, Tensor]] = {}

    def error(name: str, loss: Loss, truth: Loss) -> float:
        key = WITHOUT in name
        if key not in truths:
            truths[key] = _step(truth, wide)
        pairs = zip(_step(loss, rows), truths[key], strict=True)
        return max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)

    contestants = {
        name: Contestant(
            partial(_step, loss, rows), partial(error, name, loss, truth), "fastcl" if "fastcl" in name else "torch"
        )
        for name, (loss, truth) in found.items()
    }
    return side_by_side.measure(SUITE, case.name, contestants, {}, device, 1e-4, **effort)


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    cases = QUICK if quick else CASES
    return side_by_side.run(
        cases, only, measure, device, quick, folder, SUITE, "Rules about pairs", circumstances, NOTE
    )
