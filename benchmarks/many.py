"""Suite ``distributed``: losses over the rows of two processes (gloo, one thread each), forward and backward."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

import fastcl
from benchmarks import machine, side_by_side
from benchmarks.cases import TEMPERATURE
from benchmarks.providers import _why_not
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.backends.choose import AVAILABLE

SUITE, PAGE = "distributed", "distributed.md"
PROCESSES = 2
BUSY = 0.05  # share of the machine used by other programs above which the page warns
EAGER, WHOLE, OPEN_CLIP, LIGHTLY, INF_CL = "eager", "eager, all logits", "open_clip", "lightly", "Inf-CL"
NOTE = (
    f"float32, {PROCESSES} gloo processes on this machine, one thread each. Loss and gradients of each process's "
    "rows, collectives included; times of the first process. *eager*: gathers rows with gradient, and each process "
    "computes its own logits (open_clip's `local_loss`); *all logits*: every process computes the whole matrix. Error: "
    "the relative error of the loss or of a process's gradient, whichever is larger, against float64 in one process."
)


@dataclass(frozen=True)
class Case:
    """`rows` per process: two sets in both directions, or a self-contrast of two views of half as many samples."""

    rows: int
    two_sets: bool
    d: int = 128

    @property
    def name(self) -> str:
        return f"{'two sets' if self.two_sets else 'self-contrast, pairs'}, {PROCESSES} x {self.rows}, D={self.d}"

    def sets(self) -> tuple[Tensor, Tensor]:
        """The two sets, or the two views, of all processes together: [rows, D] each."""
        g = torch.Generator().manual_seed(0)
        rows = PROCESSES * (self.rows if self.two_sets else self.rows // 2)
        left, right = (torch.randn(rows, self.d, generator=g) for _ in range(2))
        return left, right


CASES = (Case(2048, True), Case(512, True), Case(2048, False))
QUICK = (Case(256, True),)

Loss = Callable[[Tensor, Tensor], Tensor]  # takes this process's two sets or views


def formula(case: Case, left: Tensor, right: Tensor) -> Tensor:
    """The loss on one process that has all rows."""
    left, right = F.normalize(left, dim=1), F.normalize(right, dim=1)
    if case.two_sets:
        logits = left @ right.T / TEMPERATURE
        own = torch.arange(len(left))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    both = torch.cat([left, right])
    logits = (both @ both.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(both)).roll(len(left)))


def _gathered(rows: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    with warnings.catch_warnings():  # newer versions of torch deprecate this function, but the peers call it
        warnings.simplefilter("ignore", FutureWarning)
        return torch.cat(all_gather(rows))


def eager(case: Case, left: Tensor, right: Tensor) -> Tensor:
    """The method of open_clip's local loss, and of lightly with `gather_distributed`."""
    left, right = F.normalize(left, dim=1), F.normalize(right, dim=1)
    all_left, all_right = _gathered(left), _gathered(right)
    place = torch.arange(len(left)) + dist.get_rank() * len(left)
    if case.two_sets:
        logits, others = left @ all_right.T / TEMPERATURE, right @ all_left.T / TEMPERATURE
        return (F.cross_entropy(logits, place) + F.cross_entropy(others, place)) / 2
    both, everyone = torch.cat([left, right]), torch.cat([all_left, all_right])
    places = torch.cat([place, place + len(all_left)])
    logits = (both @ everyone.T / TEMPERATURE).scatter(1, places[:, None], -torch.inf)
    return F.cross_entropy(logits, places.roll(len(left)))


def whole(case: Case, left: Tensor, right: Tensor) -> Tensor:
    return formula(case, _gathered(left), _gathered(right))


def _fastcl(case: Case, gather: bool | str, backend: str) -> Loss:
    criterion = fastcl.ClusterInfoNCE(TEMPERATURE, symmetric=case.two_sets, gather=gather)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        with fastcl.use_backend(backend):
            found: Tensor = (
                criterion(left, contrasts=right) if case.two_sets else criterion(torch.stack([left, right], 1))
            )
        return found

    return loss


def _open_clip(left: Tensor, right: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    criterion = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=PROCESSES)
    found: Tensor = criterion(F.normalize(left, dim=1), F.normalize(right, dim=1), 1 / TEMPERATURE)
    return found


def losses(case: Case) -> tuple[dict[str, tuple[Loss, str]], dict[str, str]]:
    """Losses by name, each with the package that gives its version; and missing providers with the reason."""
    found: dict[str, tuple[Loss, str]] = {}
    for backend in ("cpu", "chunked"):
        if backend in AVAILABLE:
            found[f"fastcl {backend}"] = _fastcl(case, True, backend), "fastcl"
            found[f"fastcl {backend}, ring"] = _fastcl(case, "ring", backend), "fastcl"
    found[EAGER], found[WHOLE] = (partial(eager, case), "torch"), (partial(whole, case), "torch")
    missing = {INF_CL: "needs a GPU"}
    module = "open_clip.loss" if case.two_sets else "lightly.loss.ntx_ent_loss"
    name = OPEN_CLIP if case.two_sets else LIGHTLY
    reason = _why_not(module)
    if reason is not None:
        missing[name] = reason
    elif case.two_sets:
        found[name] = _open_clip, "open_clip_torch"
    else:
        from lightly.loss.ntx_ent_loss import NTXentLoss

        found[name] = NTXentLoss(TEMPERATURE, gather_distributed=True), "lightly"
    return found, missing


def _process(rank: int, case: Case, folder: str, effort: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    found, missing = losses(case)
    left, right = (rows.tensor_split(PROCESSES)[rank].clone().requires_grad_() for rows in case.sets())

    def step(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(left, right)
        return value.detach(), *torch.autograd.grad(value, (left, right))

    names = list(found)
    order = torch.zeros(1, dtype=torch.int64)
    if rank > 0:  # follows the first process, which broadcasts the index of a name, or -1 to end
        while True:
            dist.broadcast(order, 0)
            if order.item() < 0:
                break
            value, *_ = step(found[names[int(order.item())]][0])
            dist.all_reduce(value)
    else:

        def together(name: str) -> tuple[Tensor, ...]:
            order.fill_(names.index(name))
            dist.broadcast(order, 0)
            value, *gradients = step(found[name][0])
            dist.all_reduce(value)
            return value / PROCESSES, *gradients

        def error(name: str) -> float:
            got = together(name)
            pairs = zip(got, truth(case), strict=True)
            return max(float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)

        contestants = {
            name: Contestant(partial(together, name), partial(error, name), package)
            for name, (_, package) in found.items()
        }
        cpu = torch.device("cpu")
        rows = side_by_side.measure(SUITE, case.name, contestants, missing, cpu, 1e-4, **effort)
        dist.broadcast(order.fill_(-1), 0)
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def truth(case: Case) -> tuple[Tensor, ...]:
    """The loss of all rows in float64, and the first process's gradients, times the number of processes."""
    left, right = (rows.double().requires_grad_() for rows in case.sets())
    value = formula(case, left, right)
    gradients = torch.autograd.grad(value, (left, right))
    return value.detach(), *(gradient.tensor_split(PROCESSES)[0] * PROCESSES for gradient in gradients)


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    with tempfile.TemporaryDirectory() as folder:
        watch = machine.Others()
        spawn(_process, (case, folder, effort), nprocs=PROCESSES)
        taken = watch.share()
        rows: list[Row] = json.loads(Path(folder, "rows.json").read_text())
    return [row | {"taken_by_others": taken} for row in rows]


def _busy(rows: list[Row]) -> str:
    share = max((row["taken_by_others"] or 0 for row in rows), default=0)
    return f" **The machine was not quiet**: other programs took up to {share:.0%} of it." if share > BUSY else ""


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    rows: list[Row] = []
    for case in QUICK if quick else CASES:
        if only in case.name:
            rows += measure(case, device, rounds=(3, 15), seconds=0.5 if quick else 1.5)
            side_by_side.write(
                folder, SUITE, rows, side_by_side.page("Two processes", rows, circumstances + _busy(rows), NOTE)
            )
    return rows
