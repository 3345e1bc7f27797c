"""What the processes of tests/distributed/test_distributed_prototypes.py run: prototype losses of uneven rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastcl
from tests.support.strategies import generator

F64 = torch.float64
SAMPLES = {1: (7,), 2: (5, 2), 3: (4, 0, 3)}  # rows of each process
PROTOTYPES, WIDTH, PATCHES = 6, 4, 2
STEPS = 2  # so that a moved centre is used
CASES = ("DINO, mean", "DINO, Sinkhorn", "DINO, from features", "iBOT, mean", "iBOT, Sinkhorn", "CAPI")


class Head(nn.Module):
    """Prototypes, a loss, and rows of student and teacher: two crops of each process's samples."""

    def __init__(self, name: str, gather: bool) -> None:
        super().__init__()
        kind, _, how = name.partition(", ")
        options: dict[str, Any] = {"gather": gather}
        if kind == "CAPI":
            self.loss: nn.Module = fastcl.CapiLoss(PROTOTYPES, **options)
        else:
            options["centering"] = "mean" if how == "mean" else "sinkhorn"
            if how == "Sinkhorn":
                options["prior"] = fastcl.power_law_prior(PROTOTYPES)
            self.loss = (fastcl.DINOLoss if kind == "DINO" else fastcl.IBOTLoss)(PROTOTYPES, **options)
        self.kind, self.from_features = kind, how == "from features"
        start = torch.randn(PROTOTYPES, WIDTH, dtype=F64, generator=generator(11))
        self.prototypes = nn.Parameter(start / start.norm(dim=1, keepdim=True))

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Any:
        fixed = self.prototypes.detach() * 0.9
        if self.from_features:
            return self.loss([(x, self.prototypes) for x in student.unbind(1)], [(y, fixed) for y in teacher.unbind(1)])
        own, goals = student @ self.prototypes.T, teacher @ fixed.T
        if self.kind == "CAPI":
            return self.loss(own, goals)
        if self.kind == "iBOT":
            return self.loss(own[mask], goals[mask], mask)
        return self.loss(list(own.unbind(1)), list(goals.unbind(1)))


def run(name: str, mine: slice, gather: bool, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Losses, gradient of the prototypes summed over the steps, and centre."""
    g, n = generator(3), sum(SAMPLES[1])
    student, teacher = (torch.randn(STEPS, n, PATCHES, WIDTH, dtype=F64, generator=g) for _ in range(2))
    masks = torch.rand(STEPS, n, PATCHES, generator=g) < 0.6
    head = Head(name, gather)
    model, losses = wrap(head), []
    for step in range(STEPS):
        loss = model(*(rows[step, mine] for rows in (student, teacher, masks)))
        loss.backward()
        losses.append(loss.detach())
    assert head.prototypes.grad is not None
    found = {"losses": torch.stack(losses), "prototypes": head.prototypes.grad}
    center = getattr(head.loss, "center", None)
    return found if center is None else found | {"center": center}


def everything(rank: int, world: int) -> dict[str, Any]:
    """By case, what `run` finds in this process, the model wrapped for averaging."""
    counts = SAMPLES[world]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    found: dict[str, Any] = {name: run(name, mine, True, nn.parallel.DistributedDataParallel) for name in CASES}
    if world == 2:
        found |= {"errors": {name: error_of(call, rank) for name, call in REFUSED.items()}, "empty": nothing()}
    return found


def scores(rows: int = 3, columns: int = PROTOTYPES) -> Tensor:
    return torch.randn(rows, columns, generator=generator(5))


REFUSED: dict[str, Callable[[int], Any]] = {  # calls that are wrong on rank 0
    "rows": lambda rank: fastcl.DINOLoss(PROTOTYPES, gather=True)([scores(), scores(3 if rank else 5)], [scores()]),
    "kinds": lambda rank: fastcl.DINOLoss(PROTOTYPES, centering="sinkhorn", gather=True)(
        [scores(), scores()], [scores() if rank else (scores(), scores(PROTOTYPES))]
    ),
    "prior": lambda rank: fastcl.CapiLoss(PROTOTYPES, prior=torch.ones(PROTOTYPES + 1 - rank), gather=True)(
        scores()[None], scores()[None]
    ),
    "positions": lambda rank: fastcl.functional.capi_loss(
        scores(12).view(3 + rank, 4 - rank, -1), scores(12).view(3 + rank, 4 - rank, -1), gather=True
    ),
    "center": lambda rank: fastcl.functional.dino_loss(
        [scores(), scores()], [scores()], center=torch.zeros(PROTOTYPES + 1 - rank), gather=True
    ),
}


def error_of(call: Callable[[int], Any], rank: int) -> str:
    try:
        call(rank)
    except ValueError as error:
        return str(error)
    return "nothing"


def nothing() -> list[float]:
    """Losses of no rows in any process."""
    empty, options = scores(0), {"centering": "sinkhorn", "gather": True}
    unmasked = torch.zeros(2, 3, dtype=torch.bool)
    return [
        float(fastcl.DINOLoss(PROTOTYPES, **options)([empty, empty], [empty])),
        float(fastcl.IBOTLoss(PROTOTYPES, **options)(empty, empty, unmasked)),
    ]
