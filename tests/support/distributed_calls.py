"""What the processes of test_distributed.py run besides losses: mismatched calls, second derivatives, collectives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fastcl
from fastcl import distributed, exchange
from fastcl.functional import cluster_infonce
from tests.support.distributed_cases import (
    BF16,
    F32,
    F64,
    MODES,
    SAMPLES,
    accumulated,
    compiled,
    meshed,
    observed,
    queues,
    run_infonce,
    run_others,
)
from tests.support.strategies import generator


def disagreements(rank: int, world: int) -> dict[str, str]:
    """The errors of the processes for calls that differ between them."""
    z = torch.randn(4, 2, 3 + rank)
    views, x, y, p = torch.randn(4, 2, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(5, 3)
    c, w = torch.arange(4) // 2, torch.ones(4)
    first = rank == 0
    torch.manual_seed(0)
    same = torch.randn(8, 3)
    queue, other, short = (fastcl.MemoryQueue(8, 3, clusters=True) for _ in range(3))
    for memory, stored in ((queue, same), (other, same.flip(0)), (short, same[:6])):
        memory.enqueue(stored, torch.arange(len(stored)) % 3)
    bank = fastcl.MemoryBank(4, 3)
    bank.update(torch.arange(4), x)
    scores = torch.randn(4, 5 + rank)

    def learned(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_(first)

    def loss(embeddings: Tensor, *others: Any, gather: Any = True, **options: Any) -> Callable[[], Any]:
        return lambda: cluster_infonce(embeddings, *others, gather=gather, **options)

    def swav(crops: int = 2, k: int = 5, **options: Any) -> Callable[[], Any]:
        return lambda: fastcl.SwAVLoss(gather=True, **options)([scores[:, :k]] * crops)

    def msn(rows: int = 8, prototypes: Tensor = p, **options: Any) -> Callable[[], Any]:
        return lambda: fastcl.MSNLoss(gather=True, **options)(torch.cat([x, x, x])[:rows], y, prototypes)

    def nce(**options: Any) -> Callable[[], Any]:
        return lambda: fastcl.SampledNCELoss(gather=True, **options)(x, torch.arange(4), bank)

    # Keyed by a part of the error's text; after ":" another call that must raise it.
    calls: dict[str, Callable[[], Any]] = {
        "dimension": loss(z),
        "anchors with a gradient": loss(learned(views), gather="ring"),
        "anchors with a gradient: two sets": loss(learned(x), contrasts=y, gather="ring"),
        "anchors with a gradient: both ways": loss(learned(x), contrasts=y, symmetric=True),
        "contrasts with a gradient": loss(x, contrasts=learned(y)),
        "positives with a gradient": loss(x, c, positives=learned(y), gather="ring"),
        "logit scale with a gradient": loss(x, contrasts=y, temperature=learned(torch.tensor(0.1))),
        "weights with a gradient": loss(views, weights=learned(w)),
        "contrast_bias with a gradient: a queue's": loss(
            x, c, contrasts=[queue, y], contrast_bias=learned(torch.ones(12)), gather="ring"
        ),
        "assignments with a gradient": loss(x, assignments=learned(torch.rand(4, 3))),
        "gather = ['True', 'ring'": loss(views, gather=MODES[rank % 2]),
        "contrasts = ['stored', 'tensors'": loss(x, c, contrasts=queue if first else y),
        "contrasts = ['stored', 'both'": loss(x, c, contrasts=queue if first else [queue, y]),
        "weights given": loss(x, c, contrasts=queue, weights=w if first else None),
        "weights given: rows": loss(x, c, weights=w if first else None),
        "normalised anchors": loss(x, c, normalize=first),
        "margin = [0.25, 1.0": loss(x, c, margin=0.25 if first else 1),
        "form = ['outside', 'inside'": loss(x, c, form="outside" if first else "inside"),
        "denominator": loss(x, c, denominator="all" if first else "negatives"),
        "reduction": loss(x, c, reduction="mean" if first else "sum"),
        "symmetric": loss(x, contrasts=y, symmetric=first),
        "clusters given": loss(views, None if first else c),
        "default clusters of contrasts": loss(x, contrasts=y, contrast_clusters=None if first else torch.arange(4)),
        "views": loss(torch.randn(4, 2 + rank, 3)),
        "dtype of anchors": loss(x.to(BF16 if first else F32), contrasts=y),
        "dtype of contrasts": loss(x, contrasts=y.to(BF16 if first else F32)),
        "ids given": loss(x, contrasts=y, **({"ids": c, "contrast_ids": c} if first else {})),
        "return_stats": loss(x, contrasts=y, return_stats=first),
        "rows of the queue": loss(x, c, contrasts=[queue, y] if first else [queue, short], symmetric=True),
        "rows of the queue (their checksum)": loss(x, c, contrasts=[queue if first else other, y], symmetric=True),
        "positives given": loss(x, c, positives=y if first else None),
        "contrast_bias given": loss(x, c, contrast_bias=w if first else None),
        "assignments = [2, 3": loss(x, assignments=torch.rand(4, min(2 + rank, 3))),
        "call = ['InfoNCE', 'Weighted'": loss(
            x, *([c] if first else []), **({} if first else {"assignments": torch.rand(4, 3)})
        ),
        "call = ['Debiased', 'InfoNCE'": lambda: (fastcl.DebiasedLoss if first else fastcl.NTXentLoss)(gather=True)(
            views if first else x, *([] if first else [y])
        ),
        "call = ['SigmoidL', 'InfoNCE'": lambda: (fastcl.SigmoidLoss if first else fastcl.ClusterInfoNCE)(gather=True)(
            x, c
        ),
        "bias with a gradient": lambda: fastcl.SigmoidLoss(0.1, learned(torch.tensor(0.5)), gather=True)(x, c),
        "call = ['MSNLoss', 'SwAVLoss'": msn() if first else swav(),
        "number of sizes": lambda: fastcl.distributed.gather_rows(*[z] * (1 + rank)),
        "length 1": lambda: fastcl.distributed.gather_rows(torch.zeros((2, 2, 3) if first else (2, 3, 2))),
        "further lengths": lambda: fastcl.distributed.gather_rows(
            torch.zeros(1, 1, 1, 1, 1, *([2, 3] if first else [3, 2]))
        ),
        "dtype = ['uint16', 'int16'": lambda: fastcl.distributed.gather_rows(
            torch.zeros(2, dtype=torch.uint16 if first else torch.int16)
        ),
        "prototypes: SwAV": swav(k=9),
        "high-resolution crops": swav(crops=3 if first else 2),
        "n_iters: SwAV": swav(n_iters=3 if first else 2),
        "epsilon = [0.5, 0.25": swav(epsilon=0.5 if first else 0.25),
        "prototypes: MSN": msn(prototypes=p[: 5 - first]),
        "n_iters: MSN": msn(n_iters=3 if first else 0),
        "same multiple": msn(rows=4 if first else 8),
        "same multiple: no multiple": msn(rows=5 if first else 8),
        "prior_weight": msn(prior_weight=1 if first else 0.5),
        "anchors or prototypes with a gradient": msn(prototypes=learned(p)),
        "form = ['nce', 'infonce'": nce(form="nce" if first else "infonce", num_negatives=3),
        "negatives": nce(num_negatives=3 if first else 2),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:  # noqa: PERF203 - the error is what is tested
            said[name] = str(error)
    return said


def own_errors(rank: int, world: int) -> dict[str, list[str]]:
    """Type and text of each process's error if the arguments of the last process are wrong in themselves."""
    x, y, p = torch.randn(4, 3), torch.randn(4, 3), torch.randn(5, 3)
    wrong = rank == world - 1
    narrow = x[:, :2] if wrong else x
    bank = fastcl.MemoryBank(4, 3)
    bank.update(torch.arange(4), x)
    queue = fastcl.MemoryQueue(4, 3)
    queue.enqueue(x)
    prior = torch.ones(5)
    prior[0] = -1 if wrong else 1
    scores = torch.randn(4, 5)
    index = torch.arange(4)
    calls: dict[str, Callable[[], Any]] = {
        "MSN, prototypes": lambda: fastcl.MSNLoss(gather=True)(x, y, p[:, :2] if wrong else p),
        "MSN, targets": lambda: fastcl.MSNLoss(gather=True)(x, narrow, p),
        "MSN, all": lambda: fastcl.MSNLoss(gather=True)(narrow, narrow, p),
        "MSN, prior": lambda: fastcl.MSNLoss(gather=True, prior=prior)(x, y, p),
        "PMSN, kl": lambda: fastcl.PMSNLoss(gather=True, prior=lambda k: prior[: k - wrong].abs())(x, y, p),
        "SwAV, crops": lambda: fastcl.SwAVLoss(gather=True)([scores, scores[: 4 - wrong]]),
        "SwAV, queue": lambda: fastcl.SwAVLoss(gather=True)([scores] * 2, [], [scores[:, wrong:]] * 2),
        "SwAV, prior": lambda: fastcl.SwAVLoss(gather=True, prior=prior)([scores, scores]),
        "SwAV, no list": lambda: fastcl.SwAVLoss(gather=True)(3 if wrong else [scores, scores]),
        "SampledNCE, bank": lambda: fastcl.SampledNCELoss(gather=True)(narrow, index, bank),
        "SampledNCE, positives": lambda: fastcl.SampledNCELoss(gather=True)(x, index, bank, positives=narrow),
        "SampledNCE, indices": lambda: fastcl.SampledNCELoss(gather=True)(x, index + wrong, bank),
        "two sets": lambda: cluster_infonce(x, contrasts=narrow, gather="ring"),
        "temperature": lambda: cluster_infonce(x, contrasts=y, temperature=0.0 if wrong else 0.1, gather=True),
        "assignments": lambda: cluster_infonce(x, assignments=scores[wrong:].abs(), gather=True),
        "weights": lambda: cluster_infonce(x, contrasts=y, weights=prior[:4], gather=True),
        "return_stats": lambda: cluster_infonce(x, contrasts=y, return_stats=3 if wrong else False, gather=True),
        "views": lambda: fastcl.NTXentLoss(gather=True)(x, narrow),
        "labels": lambda: fastcl.SupConLoss(gather=True)(x, index[wrong:]),
        "CLIP": lambda: fastcl.ClipLoss(gather="ring")(x, narrow, 10.0),
        "MoCo": lambda: fastcl.MoCoLoss(gather=True)(narrow, narrow, queue),
        "hard negatives": lambda: fastcl.HardNegativeLoss(gather=True)(x, contrasts=narrow),
        "gather_rows": lambda: fastcl.distributed.gather_rows(x, 3 if wrong else y),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:  # noqa: PERF203 - the error is what is tested
            said[name] = [type(error).__name__, str(error)]
    return said


def memories(rank: int, world: int) -> dict[str, Any]:
    """Queue and bank in a wrapped model, after only the first process has loaded a state."""
    model = torch.nn.ModuleDict(
        {"encoder": torch.nn.Linear(3, 3), "queue": fastcl.MemoryQueue(8, 3), "bank": fastcl.MemoryBank(6, 3)}
    )
    model.forward = lambda x: model["encoder"](x)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    model["queue"].enqueue(torch.randn(rank + 1, 3))  # each process enqueues its own rows, in different numbers
    if rank == 0:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        g = generator(4)
        state["queue.rows"], state["queue.enqueued"] = torch.randn(8, 3, generator=g), torch.tensor(13)
        state["bank.rows"], state["bank.filled"] = torch.randn(6, 3, generator=g), torch.ones(6, dtype=torch.bool)
        state["bank.cluster_ids"], state["bank.clustered"] = torch.arange(6) + 40, torch.tensor(1)
        model.load_state_dict(state)
    wrapped(torch.randn(2, 3))
    g = generator(5)
    x, key = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    queue, bank = model["queue"], model["bank"]
    found = {
        "lengths": (len(queue), len(bank)),
        "clusters": bank.clusters.tolist(),
        "loss": fastcl.MoCoLoss(0.1)(x, key, queue),
    }
    queue.enqueue(torch.eye(3))
    return found | {"rows": queue.rows.clone(), "oldest first": queue.embeddings, "shown": shown(rank, world)}


def shown(rank: int, world: int) -> list[str]:
    """The repr of losses with a temperature whose only shard the first process has."""
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.tensor([0.25])
    temperature = DTensor.from_local(whole if rank == 0 else whole[:0], mesh, [Shard(0)], shape=(1,), stride=(1,))
    losses = (fastcl.ClusterInfoNCE, fastcl.HardNegativeLoss, fastcl.SampledNCELoss)
    return [repr(loss(torch.nn.Parameter(temperature))) for loss in losses]


def penalised(rank: int | None, world: int) -> dict[str, Any]:
    """Second derivatives, summed over the processes' functions, or the text of the error.

    rank None: in one process.
    """
    first = 0 if rank is None else sum(SAMPLES[world][:rank])
    mine = slice(first, 9 if rank is None else first + SAMPLES[world][rank])
    scale = 1 if rank is None else world

    def second(call: Callable[[Tensor], Tensor], leaf: Tensor) -> Any:
        leaf = leaf.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(call(leaf) / scale, leaf, create_graph=True)
        try:
            return torch.autograd.grad(gradient.square().sum(), leaf)[0]
        except RuntimeError as error:
            return str(error)

    g = generator(5)
    whole = {name: torch.randn(9, 2, 3, dtype=F64, generator=g) for name in ("x", "y")}
    x, y = (value[mine] for value in whole.values())
    w, r = (torch.rand(9, 4, dtype=F64, generator=g)[mine] for _ in range(2))
    p, bias = torch.randn(5, 3, dtype=F64, generator=g), torch.randn(9, dtype=F64, generator=g)[mine]
    results = {
        "weights": second(lambda w: cluster_infonce(x, weights=w, gather=rank is not None), w[:, 0]),
        "MSN": second(lambda x: fastcl.MSNLoss(gather=rank is not None)(x[:, 0], y[:, 1], p), x),
        "SwAV": second(lambda s: fastcl.SwAVLoss(gather=rank is not None)([s, s * 2]), r),
    }
    for mode in MODES if rank is not None else ():
        for name, call in {
            "views": lambda x: cluster_infonce(x, gather=mode),  # noqa: B023
            "inside": lambda x: cluster_infonce(x, form="inside", gather=mode),  # noqa: B023
            "decoupled": lambda x: cluster_infonce(x, denominator="negatives", gather=mode),  # noqa: B023
            "anchors": lambda x: cluster_infonce(x[:, 0], contrasts=y[:, 0], gather=mode),  # noqa: B023
            "contrasts": lambda y: cluster_infonce(x[:, 0], contrasts=y[:, 0], gather=mode, symmetric=True),  # noqa: B023
        }.items():
            results[f"{name}, {mode}"] = second(call, x)
        results[f"temperature, {mode}"] = second(
            lambda t: cluster_infonce(x, temperature=t, gather=mode),  # noqa: B023
            torch.tensor(0.3, dtype=F64),
        )
    if rank is not None:
        results["assigned bias"] = second(
            lambda bias: cluster_infonce(x[:, 0], assignments=r, contrasts=y[:, 0], contrast_bias=bias, gather=True),
            bias,
        )
        results["assignments"] = second(lambda r: cluster_infonce(x, assignments=r, gather=True), r)
        results["assignments, ring"] = second(lambda r: cluster_infonce(x, assignments=r, gather="ring"), r)
    return results


def collectives(rank: int, world: int) -> dict[str, int]:
    """The number of collectives in a step of a loss, forward and backward: small batches wait for each of them."""
    count = 0
    names = [
        name
        for name in (
            "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor",
            "all_to_all_single", "all_reduce", "batch_isend_irecv",
        )
        if hasattr(dist, name)
    ]  # fmt: skip
    there = {name: getattr(dist, name) for name in names}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return function(*args, **options)

        return call

    n, results = SAMPLES[world][rank], {}
    x, y = (torch.randn(n, 3, requires_grad=True) for _ in range(2))
    bias, c = torch.randn(n), torch.arange(n)
    steps: dict[str, Callable[[], Tensor]] = {
        "both ways": lambda: fastcl.ClipLoss(gather=True)(x, y, 3.0),
        "views": lambda: fastcl.NTXentLoss(gather=True)(x, y),
        "clusters, ids and bias": lambda: cluster_infonce(
            x, c, contrasts=y, ids=c, contrast_ids=c, contrast_bias=bias, gather=True
        ),
    }
    rows = torch.arange(n * 5.0).view(n, 5)
    calls = {"rows": (rows, rows.short()), "more rows": (rows.repeat(5, 9), rows), "rows again": (rows, rows.short())}
    try:
        for name, function in there.items():
            setattr(dist, name, counted(function))
        for name, step in steps.items():
            for _ in range(2):  # the second one finds room for rows in the message that compares the calls
                count = 0
                step().backward()
            results[name] = count
        for name, given in calls.items():
            count = 0
            found = fastcl.distributed.gather_rows(*given)
            results[name] = count
            width, times = given[0].shape[1], len(given[0]) // max(n, 1)
            every = [torch.arange(k * 5.0).view(k, 5).repeat(times or 1, width // 5) for k in SAMPLES[world]]
            if times:
                assert torch.equal(found[0], torch.cat(every)), name
    finally:
        for name, function in there.items():
            setattr(dist, name, function)
    return results


def unequal(rank: int, world: int) -> dict[Any, bool]:
    """Whether losses are right if processes multiply them by different factors.

    Their gradients come with the forward, or are computed for equal factors first.
    """
    g = generator(rank)
    x, y = (torch.randn(SAMPLES[world][rank], 4, dtype=F64, generator=g).requires_grad_() for _ in range(2))
    temperature, bias = (torch.tensor(value, dtype=F64).requires_grad_() for value in (0.3, -1.0))
    results = {}
    for mode in MODES:
        for kind in ("sigmoid", "both ways"):

            def loss(reduction: str, mode: Any = mode, kind: str = kind) -> Tensor:
                how = {"reduction": reduction, "gather": mode}
                if kind == "sigmoid":
                    return fastcl.SigmoidLoss(temperature, bias, **how)(x, contrasts=y)
                return fastcl.ClusterInfoNCE(temperature, symmetric=True, **how)(x, contrasts=y)

            leaves = [x, y, temperature, bias][: 4 if kind == "sigmoid" else 3]
            value = loss("sum" if kind == "sigmoid" else "mean")
            found = torch.autograd.grad(value * (rank + 1), leaves, retain_graph=True)
            again = torch.autograd.grad(value * (rank + 1), leaves)
            count = 1 if kind == "sigmoid" else sum(SAMPLES[world])
            expected = torch.autograd.grad(loss("none").sum() * world / count * (rank + 1), leaves)
            results[kind, mode] = all(
                torch.allclose(a, c, rtol=1e-10, atol=1e-10) and torch.equal(a, b)
                for a, b, c in zip(found, again, expected, strict=True)
            )
    return results


def large(rank: int, world: int) -> list[dict[str, Any]]:
    """Losses and their gradients, as small batches are exchanged and as large ones are."""
    n, g = SAMPLES[world][rank], generator(rank)
    x, y, z = (torch.randn(n, 3, dtype=F64, generator=g).requires_grad_() for _ in range(3))
    temperature = torch.tensor(0.3, dtype=F64).requires_grad_()
    bias, c = torch.randn(n, dtype=F64, generator=g).requires_grad_(), torch.randint(-1, 3, (n,), generator=g)
    how = {"gather": True, "temperature": temperature}
    calls: dict[str, Callable[[], Tensor]] = {
        "both ways": lambda: cluster_infonce(x, c, contrasts=y, contrast_bias=bias, symmetric=True, **how),
        "decoupled": lambda: cluster_infonce(x, c, contrasts=y, denominator="negatives", symmetric=True, **how),
        "views": lambda: cluster_infonce(torch.stack((x, y), 1), c, **how),
        "positives": lambda: cluster_infonce(x, c, contrasts=y, positives=z, ids=c, contrast_ids=c + 1, **how),
    }
    leaves, results = (x, y, z, bias, temperature), []
    limits = distributed.MOST_BYTES, distributed.MOST_BYTES_OF_ALL
    try:
        for most in (*limits, 0):
            distributed.MOST_BYTES = distributed.MOST_BYTES_OF_ALL = exchange.MOST_BYTES_OF_ALL = most
            found = {}
            for name, call in calls.items():
                value = call()
                found[name] = (
                    value.detach(),
                    *torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True),
                )
            results.append(found)
    finally:
        distributed.MOST_BYTES, distributed.MOST_BYTES_OF_ALL = limits
        exchange.MOST_BYTES_OF_ALL = limits[1]
    return results[1:]


def not_a_number(rank: int, world: int) -> dict[str, Tensor]:
    """Losses of a call in which only the last process has a NaN."""

    def draw(rows: int, columns: int, bad: bool = False) -> Tensor:
        values = torch.randn(rows, columns)
        if bad and rank == world - 1:
            values[1, 1] = torch.nan
        return values

    def memories() -> tuple[fastcl.MemoryQueue, fastcl.MemoryBank]:
        queue, bank = fastcl.MemoryQueue(8, 3), fastcl.MemoryBank(6, 3)
        queue.enqueue(draw(8, 3, True))
        bank.update(torch.arange(6), draw(6, 3, True))
        return queue, bank

    torch.manual_seed(rank)
    n, prototypes = 4, torch.randn(5, 3, generator=generator(0))
    queue, bank = memories()
    indices, negatives = torch.arange(n), torch.arange(6).expand(n, 6)
    results = {}
    for mode in MODES:
        for form in ("outside", "inside"):
            loss = fastcl.ClusterInfoNCE(gather=mode, form=form)
            results[f"anchors, {form}, {mode}"] = loss(draw(n, 3, True), contrasts=draw(n, 3))
            results[f"contrasts, {form}, {mode}"] = loss(draw(n, 3), contrasts=draw(n, 3, True))
            results[f"views, {form}, {mode}"] = loss(draw(2 * n, 3, True).unflatten(0, (n, 2)))
        results[f"sum, {mode}"] = fastcl.ClusterInfoNCE(gather=mode, reduction="sum")(
            draw(n, 3), contrasts=draw(n, 3, True)
        )
        results[f"weights, {mode}"] = fastcl.ClusterInfoNCE(gather=mode)(
            draw(n, 3, True), contrasts=draw(n, 3), weights=torch.full((n,), 10.0 ** (rank - 42))
        )
        for loss in (fastcl.DebiasedLoss(gather=mode), fastcl.HardNegativeLoss(gather=mode)):
            name = type(loss).__name__
            results[f"{name}, {mode}"] = loss(draw(n, 3), contrasts=draw(n, 3, True))
        results[f"queue, {mode}"] = fastcl.MoCoLoss(gather=mode)(draw(n, 3), draw(n, 3), queue)
    for mode in MODES:
        results[f"assignments, {mode}"] = fastcl.ClusterInfoNCE(gather=mode)(
            draw(n, 3), contrasts=draw(n, 3, True), assignments=torch.rand(n, 4)
        )
    results["SwAV"] = fastcl.SwAVLoss(gather=True)([draw(n, 5, True), draw(n, 5)], [draw(n, 5)])
    results["SwAV, queue"] = fastcl.SwAVLoss(gather=True)([draw(n, 5)] * 2, [], [draw(n, 5, True), draw(n, 5)])
    results["MSN, targets"] = fastcl.MSNLoss(gather=True)(draw(n, 3), draw(n, 3, True), prototypes)
    results["MSN, anchors"] = fastcl.MSNLoss(gather=True)(draw(n, 3, True), draw(n, 3), prototypes)
    for form in ("nce", "infonce"):
        results[f"sampled, {form}"] = fastcl.SampledNCELoss(gather=True, form=form)(
            draw(n, 3), indices, bank, negatives=negatives
        )
    return {name: value.detach() for name, value in results.items()}


def light_weights(rank: int, world: int) -> Tensor:
    """A weighted mean whose weights are tiny, and of a different size in each process."""
    x, y = (torch.randn(4 * world, 3, generator=generator(seed))[4 * rank : 4 * rank + 4] for seed in (0, 1))
    weights = torch.linspace(1, 2, 4, dtype=F64) * 10.0 ** (rank - 300)
    return cluster_infonce(x, contrasts=y, weights=weights, gather=True)


def everything(rank: int, world: int) -> dict[str, Any]:
    subjects = (
        run_infonce, run_others, accumulated, queues, memories, disagreements, own_errors, compiled, penalised,
        collectives, large, not_a_number, light_weights, unequal, meshed, observed,
    )  # fmt: skip
    return {work.__name__: work(rank, world) for work in subjects}
