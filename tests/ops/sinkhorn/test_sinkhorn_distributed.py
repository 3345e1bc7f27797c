"""Rows spread over processes (gloo): the same assignments and gradients as one process with all rows."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

import fastcl
from tests.support.strategies import generator

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
ROWS = (13, 6)  # number of rows of each process


def problem() -> dict[str, Tensor]:
    g = generator(0)
    n, k = sum(ROWS), 7
    return {
        "scores": torch.randn(n, k, dtype=torch.float64, generator=g),
        "prior": torch.rand(k, dtype=torch.float64, generator=g) + 0.1,
        "row_marginal": torch.rand(n, dtype=torch.float64, generator=g) + 0.1,
        "weight": torch.randn(n, k, dtype=torch.float64, generator=g),
        "row_weight": torch.randn(n, dtype=torch.float64, generator=g),
        "col_weight": torch.randn(k, dtype=torch.float64, generator=g),
        "init": torch.randn(k, dtype=torch.float64, generator=g),
        "anchors": torch.randn(n, 5, generator=g),
        "targets": torch.randn(n, 5, generator=g),
        "prototypes": torch.randn(k, 5, generator=g),
    }


def share(values: Tensor, rank: int | None) -> Tensor:
    if rank is None:
        return values
    start = sum(ROWS[:rank])
    return values[start : start + ROWS[rank]]


def solved(rank: int | None, group: Any, tol: float | None, warm: bool) -> dict[str, Tensor]:
    """Result and gradients for the rows of a process, or for all rows (rank None)."""
    p = problem()
    leaves = {
        "scores": share(p["scores"], rank).clone(),
        "epsilon": torch.tensor(0.4, dtype=torch.float64),
        "prior": p["prior"],
        "row_marginal": share(p["row_marginal"], rank).clone(),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    result = fastcl.sinkhorn(
        **leaves, n_iters=4 if tol is None else 2000, tol=tol, init=p["init"] if warm else None, group=group
    )
    cost = result.transport_cost
    total = (result.assignments * share(p["weight"], rank)).sum() + 3 * cost
    if tol is None:  # potentials of the fixed point are defined up to a constant
        total = total + (result.row_potential * share(p["row_weight"], rank)).sum()
        # Every process has the column potentials, so each takes a part of this term.
        part = 1 if rank is None else (0.25, 0.75)[rank]
        total = total + part * (result.col_potential * p["col_weight"]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {
        "assignments": result.assignments.detach(),
        "row_potential": result.row_potential.detach(),
        "col_potential": result.col_potential.detach(),
        "n_iters": torch.as_tensor(result.n_iters),
        "transport_cost": cost.detach(),
    } | named


def losses(rank: int | None, group: Any) -> dict[str, Tensor]:
    p, results = problem(), {}
    for name, loss in (("pmsn", fastcl.PMSNLoss(gather=True)), ("swav", fastcl.SwAVLoss(gather=True))):
        prototypes = p["prototypes"].clone().requires_grad_()
        anchors, targets = (share(p[side], rank) for side in ("anchors", "targets"))
        if name == "pmsn":
            value = loss(anchors, targets, prototypes)
        else:
            unit = torch.nn.functional.normalize(prototypes, dim=1)
            value = loss([torch.nn.functional.normalize(rows, dim=1) @ unit.T for rows in (anchors, targets)])
        results[name] = value.detach()
        (results[f"d {name}"],) = torch.autograd.grad(value, prototypes)
    return results


def without_rows(rank: int, group: Any) -> dict[str, Tensor]:
    """One process has no rows, and takes part nevertheless."""
    scores = problem()["scores"][: 13 * (1 - rank)]
    return {"col_potential": fastcl.sinkhorn(scores, group=group).col_potential}


def _process(rank: int, folder: str, work: Callable[..., dict[str, Tensor]], backend: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(ROWS))
    with fastcl.use_backend(backend):
        torch.save(work(rank, dist.group.WORLD, *arguments), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def spread(work: Callable[..., dict[str, Tensor]], backend: str, *arguments: Any) -> list[dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (folder, work, backend, arguments), nprocs=len(ROWS))
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(len(ROWS))]


@pytest.mark.slow
@pytest.mark.parametrize(("tol", "warm"), [(None, False), (None, True), (1e-11, False)])
def test_two_processes_solve_what_one_solves(tol, warm) -> None:
    backend = "cpu" if "cpu" in fastcl.ops.backends.choose.AVAILABLE else "chunked"
    whole, parts = solved(None, None, tol, warm), spread(solved, backend, tol, warm)
    close = {"rtol": 1e-7, "atol": 1e-9}
    for name in ("assignments", "row_potential", "d scores", "d row_marginal"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], **close)
    for name in ("d epsilon", "d prior", "transport_cost"):  # each process has its share of these
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], **close)
    for part in parts:
        torch.testing.assert_close(part["col_potential"], whole["col_potential"], **close)
        assert part["n_iters"] == whole["n_iters"]


@pytest.mark.slow
def test_losses_of_two_processes_average_to_that_of_one() -> None:
    whole, parts = losses(None, None), spread(losses, "chunked")
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / len(parts), value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_process_may_have_no_rows() -> None:
    expected = fastcl.sinkhorn(problem()["scores"][:13]).col_potential
    for backend in fastcl.ops.backends.choose.AVAILABLE:
        for part in spread(without_rows, backend):
            torch.testing.assert_close(part["col_potential"], expected)
