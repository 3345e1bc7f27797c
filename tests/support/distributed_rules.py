"""What the processes of tests/distributed/test_distributed_rules.py run: calls with rules about pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import ClusterInfoNCE
from fastcl.guide import Guide
from tests.support.strategies import generator

F64 = torch.float64
SAMPLES = (3, 0, 6)
MODES = (True, "ring")
SYMMETRIC, ONE_WAY = {"symmetric": True}, {"symmetric": False}


def whole() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name, the arguments of a call over all rows, and its options."""
    g = generator(7)
    n = sum(SAMPLES)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    def numbers(most: int) -> Tensor:
        return torch.randint(-1, most, (n,), generator=g)

    views, z, y = randn(n, 2, 4), randn(n, 4), randn(n, 4)
    tags = torch.rand(n, 70, generator=g) < 0.03
    guide = Guide(randn(n, 3), randn(n, 3), margin=0.1)
    hard = randn(n, 2, 4)
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
    }  # fmt: skip


def everything(rank: int, world: int) -> dict[str, Any]:
    mine = slice(sum(SAMPLES[:rank]), sum(SAMPLES[: rank + 1]))
    return {f"{name}, {mode}": called(*case, mode, mine) for name, case in whole().items() for mode in MODES}


def called(arguments: dict[str, Any], options: dict[str, Any], gather: Any, mine: slice) -> dict[str, Tensor]:
    """The loss and the gradients of the floating rows [mine] of a call."""
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Guide):
            others, threshold = value.contrast_embeddings, value.threshold
            if threshold is not None:
                threshold = threshold.view(sum(SAMPLES), -1)[mine].flatten()
            others = None if others is None else others[mine]
            given[name] = Guide(value.embeddings[mine], others, margin=value.margin, threshold=threshold)
        elif isinstance(value, Tensor):
            given[name] = value[mine].clone().requires_grad_(value.is_floating_point())
        else:
            given[name] = value
    rows = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    loss = ClusterInfoNCE(0.3, gather=gather, **options)(given.pop("embeddings"), **given)
    loss.backward()
    return {"loss": loss.detach(), **{name: value.grad for name, value in rows.items()}}
