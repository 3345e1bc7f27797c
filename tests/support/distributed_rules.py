"""What the processes of tests/distributed/test_distributed_rules.py run: rules about pairs, and `GISTEmbedLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcl import ClusterInfoNCE, GISTEmbedLoss, MemoryQueue
from fastcl.guide import Guide
from tests.support.strategies import generator

F64 = torch.float64
SAMPLES = {2: (3, 6), 3: (3, 0, 6)}
N = 9
MODES = (True, "ring")
SYMMETRIC, ONE_WAY = {"symmetric": True}, {"symmetric": False}


def whole() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name, the arguments of a call over all rows, and its options."""
    g = generator(7)
    n = N

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    def numbers(most: int) -> Tensor:
        return torch.randint(-1, most, (n,), generator=g)

    views, z, y = randn(n, 2, 4), randn(n, 4), randn(n, 4)
    tags = torch.rand(n, 70, generator=g) < 0.03
    guide = Guide(randn(n, 3), randn(n, 3), margin=0.1)
    hard = randn(n, 2, 4)
    paired = {"embeddings": z, "contrasts": y, "clusters": tags, "queue": 11}
    return {
        "views": ({"embeddings": views, "clusters": tags, "ids": numbers(4), "groups": numbers(2)}, ONE_WAY),
        "one view": ({"embeddings": z, "clusters": tags, "groups": numbers(2), "hard_negatives": hard}, ONE_WAY),
        "two sets": (
            {"embeddings": z, "contrasts": y, "ids": numbers(4), "keep_pairs": True, "guide": guide,
             "hard_negatives": hard, "groups": numbers(2)},
            SYMMETRIC,
        ),
        "tags both ways": ({"embeddings": z, "contrasts": y, "clusters": tags}, SYMMETRIC),
        "alone with a guide": (
            {"embeddings": views, "guide": Guide(randn(n, 3), threshold=torch.rand(2 * n, generator=g, dtype=F64))},
            ONE_WAY,
        ),
        "clusters with a guide": (
            {"embeddings": views, "clusters": numbers(3), "guide": Guide(randn(n, 3), margin=0.1)}, ONE_WAY,
        ),
        "tags with a guide both ways": (
            {"embeddings": z, "contrasts": y, "clusters": tags, "guide": guide, "groups": numbers(2)}, SYMMETRIC,
        ),
        "a queue of tags": ({"embeddings": z, "clusters": tags, "queue": 11}, ONE_WAY),
        "a queue of tags and the batch": (paired, ONE_WAY),
        "a queue of tags both ways": (paired, SYMMETRIC),
    }  # fmt: skip


def queue_of(length: int, seed: int = 3) -> MemoryQueue:
    """The same rows and tags in every process; of another seed, other tags."""
    queue = MemoryQueue(16, 4, dtype=F64, tags=70)
    rows = torch.randn(length, 4, generator=generator(2), dtype=F64)
    queue.enqueue(rows, torch.rand(length, 70, generator=generator(seed)) < 0.03)
    return queue


GISTS: dict[str, dict[str, Any]] = {
    "gist": {},
    "gist, relative": {"margin": 0.1, "rule": "relative"},
    "gist, one side": {"contrast_positives": False, "margin": 0.3},
    "gist, no negatives": {"contrast_anchors": False},
}


def gist(name: str, gather: Any, mine: slice) -> dict[str, Tensor]:
    """The loss and the gradients of a call of `GISTEmbedLoss` on the rows [mine]."""
    g = generator(11)
    base, guide = torch.randn(N, 4, generator=g, dtype=F64), torch.randn(N, 3, generator=g, dtype=F64)

    def near(rows: Tensor, noise: float) -> Tensor:
        return (rows + noise * torch.randn(rows.shape, generator=g, dtype=F64))[mine]

    leaves = {"anchors": near(base, 0.5), "positives": near(base, 0.5), "negatives": near(base, 3)}
    guides = [near(guide, 0.7), near(guide, 0.7), near(guide, 3)]
    if name == "gist, no negatives":
        del leaves["negatives"], guides[2]
    elif mine.start == 0:  # another number of negatives than of pairs
        leaves["negatives"], guides[2] = leaves["negatives"][1:], guides[2][1:]
    for leaf in leaves.values():
        leaf.requires_grad_()
    rows = list(leaves.values())
    loss = GISTEmbedLoss(torch.nn.Parameter(torch.tensor(0.3, dtype=F64)), gather=gather, **GISTS[name])
    value = loss(*rows[:2], *guides[:2], *rows[2:], *guides[2:])
    value.backward()
    leaves["temperature"] = loss.temperature
    found = {"loss": value.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        found[name] = leaf.grad
    return found


def disagreement(rank: int, gather: Any) -> list[str]:
    """The errors of calls that are not the same in all processes."""
    z = torch.randn(3, 4, generator=generator(rank), dtype=F64)
    tags = torch.ones(3, 70, dtype=torch.bool)
    broken = torch.full_like(z, torch.nan) if rank else z
    calls = (
        lambda: ClusterInfoNCE(symmetric=True, gather=gather)(z, tags, contrasts=[z, queue_of(5, 3 + rank)]),
        lambda: GISTEmbedLoss(gather=gather, margin=0.1 * rank)(z, z, z, z),
        lambda: GISTEmbedLoss(gather=gather)(z, z, z, z, *([] if rank else [z, z])),
        lambda: GISTEmbedLoss(gather=gather)(z, z, z, broken),
    )
    return [message_of(call) for call in calls]


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def everything(rank: int, world: int) -> dict[str, Any]:
    counts = SAMPLES[world]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    found: dict[str, Any] = {}
    for mode in MODES:
        found |= {f"{name}, {mode}": called(*case, mode, mine) for name, case in whole().items()}
        found |= {f"{name}, {mode}": gist(name, mode, mine) for name in GISTS}
        found[f"disagreement, {mode}"] = disagreement(rank, mode)
    return found


def called(arguments: dict[str, Any], options: dict[str, Any], gather: Any, mine: slice) -> dict[str, Tensor]:
    """The loss and the gradients of the floating rows [mine] of a call."""
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Guide):
            others, threshold = value.contrast_embeddings, value.threshold
            if threshold is not None:
                threshold = threshold.view(N, -1)[mine].flatten()
            others = None if others is None else others[mine]
            given[name] = Guide(value.embeddings[mine], others, margin=value.margin, threshold=threshold)
        elif isinstance(value, Tensor):
            given[name] = value[mine].clone().requires_grad_(value.is_floating_point())
        else:
            given[name] = value
    rows = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    if "queue" in given:
        queue, own = queue_of(given.pop("queue")), given.get("contrasts")
        given["contrasts"] = queue if own is None else [own, queue]
    loss = ClusterInfoNCE(0.3, gather=gather, **options)(given.pop("embeddings"), **given)
    loss.backward()
    return {"loss": loss.detach(), **{name: value.grad for name, value in rows.items()}}
