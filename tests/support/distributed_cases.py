"""What the processes of test_distributed.py run: calls of `cluster_infonce` with shared-out rows, and other losses.

A process holds its share of the samples, and the contrasts that belong with them.
"""

import copy
import gc
import json
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.judging import combination
from tests.support.strategies import LossProblem, generator, loss_problem

SAMPLES = {2: (3, 6), 4: (3, 0, 4, 2)}  # samples of each process
MODES = (True, "ring")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def infonce_problems() -> dict[str, tuple[LossProblem, str | None]]:
    """Problems by name, with the backend (None: the default)."""
    sets = {"contrasts": "paired", "m": 9}
    kinds: dict[str, dict[str, Any]] = {
        "views": {"pattern": None},
        "clusters across processes": {"pattern": "huge"},
        "some in no cluster": {"pattern": "negatives", "weights": True, "bias": True},
        "one view": {"views": 0, "pattern": "pairs", "denominator": "negatives", "reduction": "sum"},
        "inside, margin": {"form": "inside", "margin": 0.2, "reduction": "none"},
        "keys": {"pattern": "random", "positives": True, "margin": 0.1},
        "two sets": {**sets, "views": 0, "pattern": None},
        "both ways": {**sets, "views": 0, "pattern": None, "symmetric": True},
        "both ways, clusters": {
            "contrasts": "paired", "views": 2, "m": 22, "pattern": "negatives", "symmetric": True, "ids": True,
            "bias": True, "weights": True,
        },
        "both ways, unreduced": {**sets, "views": 0, "symmetric": True, "reduction": "none", "form": "inside"},
        "both ways, decoupled": {**sets, "views": 0, "symmetric": True, "denominator": "negatives"},
        "contrasts of samples": {"contrasts": "clustered", "m": 13, "pattern": None, "ids": True, "weights": True},
        "contrasts of clusters": {"contrasts": "clustered", "m": 13, "views": 0, "pattern": "huge", "bias": True},
        "a list": {"contrasts": "list", "m": 21, "pattern": "random", "positives": True},
        "left out of their own": {"pattern": "huge", "bias": True},
        "left out both ways": {**sets, "views": 0, "pattern": None, "symmetric": True, "bias": True},
        "inner products": {"normalize": False, "temperature": 0.5},
        "smoothed": {"pattern": "negatives", "bias": True, "label_smoothing": 0.2},
        "smoothed both ways": {
            **sets, "views": 0, "symmetric": True, "ids": True, "bias": True, "label_smoothing": 0.2,
        },
        "pairs": {"pattern": "negatives", "form": "pairs", "bias": True, "weights": True, "margin": 0.1},
        "pairs both ways": {
            **sets, "views": 0, "pattern": "random", "symmetric": True, "ids": True, "bias": True, "form": "pairs",
        },
        "pairs, unreduced": {**sets, "views": 0, "form": "pairs", "reduction": "none", "positives": True},
    }  # fmt: skip
    found = {}
    for name, options in kinds.items():
        for dtype in (F64, F32):
            found[f"{name}, {dtype}"] = loss_problem(dtype=dtype, contrast_dtype=dtype, **options), None
    converged = {"n": 9, "d": 48, "kind": "converged", "temperature": 0.05, "pattern": None}
    for dtype in (F32, BF16):
        one = loss_problem(dtype=dtype, contrast_dtype=dtype, **converged)
        two = loss_problem(dtype=dtype, contrast_dtype=dtype, **converged, **sets | {"symmetric": True, "views": 0})
        for backend in [
            name for name in ("reference", "chunked", "cpu") if name in fastcl.ops.backends.choose.AVAILABLE
        ]:
            found[f"converged, {dtype}, {backend}"] = one, backend
            found[f"converged both ways, {dtype}, {backend}"] = two, backend
    found["two dtypes"] = loss_problem(dtype=F16, contrast_dtype=F32, **sets, views=0, symmetric=True), None
    found["cold"] = loss_problem(temperature=0.005, d=16), None
    found["cold both ways"] = loss_problem(temperature=0.005, d=16, symmetric=True, **sets, views=0), None
    return found


def arguments_of(name: str, problem: LossProblem) -> dict[str, Any]:
    """`problem.arguments()`, changed for two kinds of problem.

    With inner products some rows are so long that one base does not cover their logits. If contrasts are left out, they
    are the first ones and every third one.
    """
    arguments = problem.arguments()
    if name.startswith("inner products"):
        arguments["embeddings"][:4] *= 30
    if name.startswith("left out"):
        arguments["contrast_bias"][1::3] = -torch.inf
        arguments["contrast_bias"][:2] = -torch.inf
    return arguments


def places(problem: LossProblem, arguments: dict[str, Any], rank: int, world: int) -> dict[str, Tensor]:
    """The indices of this process's samples, rows and contrasts in the whole."""
    counts, views = SAMPLES[world], max(problem.views, 1)
    first = sum(counts[:rank])
    samples = torch.arange(first, first + counts[rank])
    rows = (samples[:, None] * views + torch.arange(views)).flatten()
    m, flat = problem.m, problem.n * views
    if problem.contrasts == "clustered":
        contrasts = torch.arange(rank, m, world)
        if problem.pattern is None:  # clusters are indices of samples, as the process numbers them
            of = arguments["contrast_clusters"]
            owner = torch.searchsorted(torch.tensor(counts).cumsum(0), of, right=True)
            contrasts = torch.where(of < 0, torch.arange(m) % world == rank, owner == rank).nonzero()[:, 0]
    else:
        contrasts = torch.cat([rows, torch.arange(flat, max(m, flat))[rank::world]])
    return {"samples": samples, "rows": rows, "contrasts": contrasts}


WHERE = {
    "embeddings": "samples", "clusters": "samples", "positives": "samples", "weights": "samples", "ids": "samples",
    "contrasts": "contrasts", "contrast_clusters": "contrasts", "contrast_ids": "contrasts",
    "contrast_bias": "contrasts",
}  # fmt: skip


def share(problem: LossProblem, arguments: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    mine, where = dict(arguments), places(problem, arguments, rank, world)
    for name, kind in WHERE.items():
        value = mine.get(name)
        if isinstance(value, list):
            rows = torch.cat(value)[where[kind]]
            mine[name] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        elif value is not None:
            mine[name] = value[where[kind]]
    if problem.contrasts == "clustered" and problem.pattern is None and len(mine["contrast_clusters"]):
        known = mine["contrast_clusters"]
        mine["contrast_clusters"] = torch.where(known < 0, known, known - sum(SAMPLES[world][:rank]))
    return mine


def run_infonce(rank: int, world: int) -> dict[str, Any]:
    """Loss and gradients of each problem and mode."""
    results = {}
    for name, (problem, backend) in infonce_problems().items():
        arguments = arguments_of(name, problem)
        mine = share(problem, arguments, rank, world)
        for mode in MODES:
            leaves = {leaf: mine[leaf].detach().clone().requires_grad_() for leaf in problem.leaves}
            with fastcl.use_backend(backend or fastcl.ops.backends.choose.choose_backend(torch.device("cpu"), F32)):
                loss = cluster_infonce(**(mine | leaves), gather=mode)
                total = loss
                if problem.reduction == "none":
                    factors = combination(arguments["embeddings"].shape[:-1])
                    total = (loss * factors[places(problem, arguments, rank, world)["samples"]].to(loss.dtype)).sum()
                gradients = torch.autograd.grad(total, list(leaves.values()))
            results[f"{name}, {mode}"] = loss.detach(), dict(zip(leaves, gradients, strict=True))
    return results


# Losses without a formula in oracle.py are compared with one process that has everything.


def other_losses(gather: Any, rank: int | None, world: int, group: Any = None, seed: int = 3) -> dict[str, Any]:
    """Loss and gradients in float64, of all samples (rank None) or of this process's."""
    g = generator(seed)
    n, d = 9, 5
    first = 0 if rank is None else sum(SAMPLES[world][:rank])
    mine = slice(first, n if rank is None else first + SAMPLES[world][rank])

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=g)[mine].requires_grad_()

    z0, z1, features = rows(n, d), rows(n, d), rows(n, 2, d)
    labels = torch.randint(-1, 3, (n,), generator=g)[mine]
    stored, theirs = torch.randn(7, d, dtype=F64, generator=g), torch.randint(-1, 3, (7,), generator=g)
    prototypes = torch.randn(6, d, dtype=F64, generator=g).requires_grad_()
    temperature = torch.tensor(0.3, dtype=F64).requires_grad_()
    negatives = torch.randint(0, n, (n, 4), generator=g)[mine]
    queue = fastcl.MemoryQueue(7, d, dtype=F64)
    queue.enqueue(stored)
    clustered = fastcl.MemoryQueue(8, d, dtype=F64, clusters=True, ids=True)
    clustered.enqueue(stored, theirs, torch.arange(7) % 4)
    bank = fastcl.MemoryBank(n, d, dtype=F64)
    bank.update(torch.arange(n), torch.randn(n, d, dtype=F64, generator=g))
    ids = torch.arange(n)[mine]
    scores = [torch.nn.functional.normalize(z, dim=1) @ prototypes.T for z in (z0, z1)]
    prior = fastcl.power_law_prior(6).double()
    of_queue = torch.randn(9, d, dtype=F64, generator=g) @ prototypes.T
    assigned = torch.rand(n, 3, dtype=F64, generator=g)[mine].requires_grad_()
    bias = (
        torch.randn(n, dtype=F64, generator=g).masked_fill(torch.arange(n) % 4 == 1, -torch.inf)[mine].requires_grad_()
    )
    how: dict[str, Any] = {"gather": gather, "group": group}
    flag = {"gather": gather is not False, "group": group}
    nce = fastcl.SampledNCELoss(0.3, num_negatives=4, **flag)
    losses: dict[str, Callable[[], Tensor]] = {
        "NTXent": lambda: fastcl.NTXentLoss(temperature, **how)(z0, z1),
        "DCL": lambda: fastcl.DCLLoss(temperature, **how)(z0, z1),
        "SupCon": lambda: fastcl.SupConLoss(temperature, **how)(features, labels),
        "Clip": lambda: fastcl.ClipLoss(**how)(z0, z1, 1 / temperature),
        "Debiased": lambda: fastcl.DebiasedLoss(temperature, **how)(features, labels),
        "HardNegative": lambda: fastcl.HardNegativeLoss(temperature, **how)(z0, labels, contrasts=z1),
        "MoCo": lambda: fastcl.MoCoLoss(temperature, **how)(z0, z1, queue),
        "a queue with clusters": lambda: fastcl.ClusterInfoNCE(temperature, **how)(
            z0, labels, contrasts=clustered, ids=ids
        ),
        "a queue beside rows": lambda: fastcl.ClusterInfoNCE(temperature, **how)(
            z0, labels, contrasts=[clustered, z1], ids=ids, contrast_ids=ids + 2, positives=z1.detach()
        ),
        "a queue beside rows, both ways": lambda: fastcl.ClusterInfoNCE(temperature, symmetric=True, **how)(
            z0, labels, contrasts=[clustered, z1], ids=ids, contrast_ids=ids + 2, weights=assigned[:, 0]
        ),
        "a queue of negatives beside rows, both ways": lambda: fastcl.ClusterInfoNCE(
            temperature, symmetric=True, form="inside", **how
        )(z0, contrasts=[queue, z1, queue]),
        "a queue alone, both ways": lambda: fastcl.ClusterInfoNCE(temperature, symmetric=True, **how)(
            z0, labels, contrasts=clustered, ids=ids
        ),
        "pairs beside a queue, both ways": lambda: fastcl.ClusterInfoNCE(
            temperature, form="pairs", symmetric=True, **how
        )(z0, labels, contrasts=[clustered, z1], ids=ids, contrast_ids=ids + 2),
        "an instance each": lambda: fastcl.ClusterInfoNCE(temperature, **how)(z0, ids, contrasts=[z1, bank]),
        "no row has a positive": lambda: fastcl.ClusterInfoNCE(temperature, **how)(z0, ids),
        "assignments": lambda: fastcl.ClusterInfoNCE(temperature, **how)(features, assignments=assigned),
        "assignments, both ways": lambda: fastcl.ClusterInfoNCE(temperature, **how, symmetric=True)(
            z0, assignments=assigned, contrasts=z1, contrast_bias=bias, ids=ids % 4, contrast_ids=ids % 3
        ),
        "assignments, their products too small": lambda: fastcl.ClusterInfoNCE(temperature, **how)(
            features, assignments=assigned * torch.logspace(-170, -169, n, dtype=F64)[mine, None]
        ),
        "SigLip": lambda: fastcl.SigLipLoss(**how)(z0, z1, 1 / temperature, -20 * temperature),
        "Sigmoid": lambda: fastcl.SigmoidLoss(temperature, -3 * temperature, **how)(features, labels),
        "Sigmoid, with a bias and weights": lambda: fastcl.SigmoidLoss(temperature, **how)(
            z0, labels, contrast_bias=bias, weights=assigned[:, 0] * 1e30, positives=z1
        ),
        "Sigmoid, with a queue": lambda: fastcl.SigmoidLoss(temperature, -2.0, **how, reduction="sum")(
            z0, labels, contrasts=[clustered, z1], ids=ids, contrast_ids=ids + 2
        ),
        "Sigmoid, a queue alone": lambda: fastcl.SigmoidLoss(temperature, -2.0, **how)(
            z0, labels, contrasts=clustered, ids=ids
        ),
        "pairs beside a queue": lambda: fastcl.ClusterInfoNCE(temperature, form="pairs", **how)(
            z0, labels, contrasts=[clustered, z1], ids=ids, contrast_ids=ids + 2
        ),
        "SampledNCE": lambda: nce(z0, ids, bank, negatives=negatives),
        "PIRL": lambda: fastcl.SampledNCELoss(0.3, form="pirl", **flag)(z0, ids, bank, negatives=negatives),
        "SwAV": lambda: fastcl.SwAVLoss(0.3, **flag)(scores),
        "SwAV with a queue": lambda: fastcl.SwAVLoss(0.3, **flag)(scores, [], [of_queue[mine], of_queue[mine] * 0.5]),
        "MSN": lambda: fastcl.MSNLoss(0.3, **flag)(torch.cat([z0, z1]), z1, prototypes),
        "PMSN": lambda: fastcl.PMSNLoss(0.3, prior=prior, n_iters=0, kl="prior_mean", **flag)(z0, z1, prototypes),
        "VICReg": lambda: fastcl.VICRegLoss(**flag)(z0, z1),
        "Barlow Twins": lambda: fastcl.BarlowTwinsLoss(**flag)(z0, z1),
        "W-MSE": lambda: fastcl.WMSELoss(**flag)(z0, z1),
        "SCAN": lambda: fastcl.SCANLoss(**flag)(z0, z1),
        "ASCL": lambda: fastcl.ASCLLoss(0.3, neighbors=3, **flag)(z0, z1, queue),
        "LDReg": lambda: fastcl.LDRegLoss(4, **flag)(z0),
        "LDReg, summed": lambda: fastcl.LDRegLoss(4, reduction="sum", **flag)(z0),
    }
    leaves = {
        "z0": z0, "z1": z1, "features": features, "assigned": assigned, "bias": bias, "prototypes": prototypes,
        "temperature": temperature,
    }  # fmt: skip
    results = {}
    for name, loss in losses.items():
        value = loss()
        gradients = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, materialize_grads=True, retain_graph=True
        )
        results[name] = value.detach(), dict(zip(leaves, gradients, strict=True))
    return results


def run_others(rank: int, world: int) -> dict[Any, dict[str, Any]]:
    return {mode: other_losses(mode, rank, world) for mode in MODES}


def meshed(rank: int, world: int) -> dict[str, Any]:
    """A 2 x 2 mesh: each data-parallel group has a batch of its own."""
    if world != 4:
        return {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    group, batch = mesh["data"].get_group(), mesh["model"].get_local_rank()
    place = dist.get_rank(group)
    results: dict[str, Any] = {str(mode): other_losses(mode, place, 2, group, 3 + batch) for mode in MODES}
    gathered = fastcl.distributed.gather_rows(torch.full((place + 1,), batch), group=group)
    loss = fastcl.ClusterInfoNCE(gather=True, group=group)
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    return results | {
        "batch": batch, "place": place, "rows": gathered, "copies": [one.group for one in copies], "shown": repr(loss),
        "kept": loss.group is group,
    }  # fmt: skip


def stats(gather: Any, rank: int | None, world: int) -> dict[str, fastcl.LossStats]:
    """The statistics that losses return beside their values."""
    g = generator(8)
    first = 0 if rank is None else sum(SAMPLES[world][:rank])
    mine = slice(first, 9 if rank is None else first + SAMPLES[world][rank])
    x, y, key = (torch.randn(9, 5, dtype=F64, generator=g)[mine] for _ in range(3))
    labels, bias = torch.randint(-1, 3, (9,), generator=g)[mine], torch.randn(9, dtype=F64, generator=g)[mine]
    queue = fastcl.MemoryQueue(7, 5, dtype=F64, clusters=True)
    queue.enqueue(torch.randn(7, 5, dtype=F64, generator=g), torch.randint(-1, 3, (7,), generator=g))
    negatives = fastcl.MemoryQueue(7, 5, dtype=F64)
    negatives.enqueue(queue.embeddings)
    how = {"gather": gather, "return_stats": True}
    calls: dict[str, Callable[[], Any]] = {
        "views": lambda: cluster_infonce(torch.stack((x, y), 1), labels, **how),
        "both ways": lambda: cluster_infonce(x, contrasts=y, contrast_bias=bias, symmetric=True, **how),
        "a queue beside rows": lambda: cluster_infonce(x, labels, contrasts=[queue, y], positives=key, **how),
        "a queue beside rows, both ways": lambda: cluster_infonce(
            x, labels, contrasts=[queue, y], symmetric=True, **how
        ),
        "unreduced": lambda: cluster_infonce(x, contrasts=y, reduction="none", **how),
        "pairs": lambda: cluster_infonce(x, labels, form="pairs", **how),
        "Sigmoid": lambda: fastcl.functional.sigmoid_loss(x, labels, bias=-1.0, contrasts=[queue, y], **how),
        "HardNegative": lambda: fastcl.HardNegativeLoss(gather=gather)(x, labels, return_stats=True),
        "MoCo": lambda: fastcl.MoCoLoss(gather=gather)(x, key, negatives, return_stats=True),
        "Clip": lambda: fastcl.ClipLoss(gather=gather)(x, y, 3.0, return_stats=True),
    }
    return {name: call()[1] for name, call in calls.items()}


def observed(rank: int, world: int) -> dict[Any, dict[str, fastcl.LossStats]]:
    return {mode: stats(mode, rank, world) for mode in MODES}


# Other work of the processes.


class Model(torch.nn.Module):
    """An encoder and a loss with a learned temperature, as DistributedDataParallel wraps it."""

    def __init__(self, gather: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(6, 4, dtype=F64)
        temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.loss = fastcl.ClusterInfoNCE(temperature, symmetric=True, gather=gather)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.encoder(left), contrasts=self.encoder(right))
        return loss


def batches() -> list[tuple[Tensor, Tensor]]:
    g = generator(1)
    return [tuple(torch.randn(2, 9, 6, dtype=F64, generator=g).unbind(0)) for _ in range(2)]  # type: ignore[misc]


def accumulated(rank: int, world: int) -> dict[Any, dict[str, Tensor]]:
    """Gradients of two batches, the first without synchronising."""
    first = sum(SAMPLES[world][:rank])
    mine = slice(first, first + SAMPLES[world][rank])
    results = {}
    for mode in MODES:
        model = torch.nn.parallel.DistributedDataParallel(Model(mode))
        (left, right), (other_left, other_right) = batches()
        with model.no_sync():
            model(left[mine], right[mine]).backward()
        model(other_left[mine], other_right[mine]).backward()
        results[mode] = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    return results


def queues(rank: int, world: int) -> dict[str, Any]:
    """Queues that are fed with gathered rows; each process brings its own, in different numbers."""
    g = generator(rank)
    queue = fastcl.MemoryQueue(11, 3, clusters=True, ids=True)
    for _ in range(3):  # the first time in several collectives, then in one
        n = SAMPLES[world][rank]
        z = torch.randn(n, 3, generator=g, requires_grad=True)
        found = fastcl.distributed.gather_rows(z, torch.randint(0, 4, (n,), generator=g), torch.full((n,), rank))
        queue.enqueue(*found)
    nothing = fastcl.distributed.gather_rows(torch.empty(0, 3))
    every_dtype = all(
        torch.equal(
            fastcl.distributed.gather_rows(torch.arange(3 + rank).to(dtype)),
            torch.cat([torch.arange(3 + q).to(dtype) for q in range(world)]),
        )
        for dtype in fastcl.distributed._DTYPES
    )
    turned = torch.arange(12).reshape(2, 3, 2).mT[: SAMPLES[world][rank]]
    shaped = fastcl.distributed.gather_rows(turned)
    every_dtype &= torch.equal(shaped, torch.cat([torch.arange(12).reshape(2, 3, 2).mT[:n] for n in SAMPLES[world]]))
    flags = fastcl.distributed.gather_rows(torch.tensor([rank % 2 == 0]))
    return {
        "state": queue.state_dict(),
        "nothing": nothing.shape,
        "flags": flags,
        "graph": found[0].requires_grad,
        "dtypes": every_dtype,
    }


def compiled(rank: int, world: int) -> dict[str, Any]:
    """A compiled function breaks its graph at the loss; a second derivative raises."""
    z = torch.randn(5, 2, 3, generator=generator(rank)).requires_grad_()
    expected = cluster_infonce(z, gather="ring") * 2
    got = torch.compile(lambda z: cluster_infonce(z * 1, gather="ring") * 2, backend="eager")(z)
    equal = torch.equal(got, expected)
    gradients = [torch.autograd.grad(loss, z, create_graph=True)[0] for loss in (got, expected)]
    said = ""
    try:
        torch.autograd.grad(gradients[0].sum(), z)
    except RuntimeError as error:
        said = str(error)
    return {"equal": equal and torch.equal(*gradients), "second derivative": said}


# Processes.


def _process(rank: int, world: int, folder: str, work: Callable[[int, int], Any], seconds: float) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/meeting", timedelta(seconds=seconds), rank=rank, world_size=world
        )
        torch.save(work(rank, world), Path(folder, f"{rank}.pt"))
        gc.collect()  # a DistributedDataParallel that outlives its process group may wait for ever
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        Path(folder, f"{rank}.error").write_text(json.dumps([type(error).__name__, traceback.format_exc()]))
        os._exit(1)  # a process group that has failed may wait for the others at exit


def spread(work: Callable[[int, int], Any], world: int, seconds: float = 60) -> tuple[list[Any], dict[int, list[str]]]:
    """The result of `work(rank, world)` in each of `world` processes (None where it failed), and their errors."""
    context = multiprocessing.get_context("forkserver")  # imports torch once, then forks
    context.set_forkserver_preload(["torch", "torch.distributed", "tests.support.distributed_calls"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(rank, world, folder, work, seconds)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(4 * seconds)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        results, errors = [], {}
        for rank in range(world):
            path = Path(folder, f"{rank}.pt")
            results.append(torch.load(path, weights_only=False) if path.exists() else None)
            failed = Path(folder, f"{rank}.error")
            if failed.exists():
                errors[rank] = json.loads(failed.read_text())
        for process in hanging:
            errors[processes.index(process)] = ["Hanging", ""]
        return results, errors
