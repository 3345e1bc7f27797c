"""The losses as a competent user writes them in plain PyTorch: the baselines, also compiled by torch.compile.

Every call builds masks from the ids, because every batch has its own ids. Rows of 16 bits are converted to float32,
unless `product` selects products in their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def block_rows(m: int) -> int:
    """Rows of logits, with M columns, in a block of the chunked losses: about 32 MB; larger blocks are not faster."""
    return min(max(2**23 // m, 1), 1024)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=1)


def _logits(x: Tensor, y: Tensor, temperature: float, product: torch.dtype) -> Tensor:
    if product == torch.float32:
        return (x / temperature) @ y.T
    return (x.to(product) @ y.to(product).T).float() / temperature


def self_contrast(
    anchors: Tensor, clusters: Tensor, temperature: float, product: torch.dtype = torch.float32
) -> Tensor:
    """anchors [N, D], clusters [N]; every row must have a positive."""
    z = _unit(anchors)
    logits = _logits(z, z, temperature, product)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(own, -torch.inf)
    positive = (clusters[:, None] == clusters) & ~own
    mean_positive = logits.masked_fill(~positive, 0).sum(1) / positive.sum(1)
    return (logits.logsumexp(1) - mean_positive).mean()


def two_sets(anchors: Tensor, contrasts: Tensor, temperature: float, product: torch.dtype = torch.float32) -> Tensor:
    """anchors, contrasts [N, D]."""
    logits = _logits(_unit(anchors), _unit(contrasts), temperature, product)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def queue(
    anchors: Tensor, keys: Tensor, stored: Tensor, temperature: float, product: torch.dtype = torch.float32
) -> Tensor:
    """anchors, keys [N, D]; stored [M, D], normalised again because half precision rounds them."""
    z = _unit(anchors)
    positive = (z * _unit(keys)).sum(1) / temperature
    negatives = _logits(z, _unit(stored), temperature, product).logsumexp(1)
    return (torch.logaddexp(negatives, positive) - positive).mean()


def _checkpointed(block: Callable[..., Any], *tensors: Any) -> Any:
    return checkpoint(block, *tensors, use_reentrant=False, preserve_rng_state=False)


def chunked_self_contrast(anchors: Tensor, clusters: Tensor, temperature: float) -> Tensor:
    """`self_contrast` in blocks of rows; the backward recomputes the logits."""
    z = _unit(anchors)
    block = block_rows(len(z))

    def terms(rows: Tensor, ids: Tensor, first: int) -> Tensor:
        logits = (rows / temperature) @ z.T
        place = torch.arange(len(rows), device=z.device)
        logits[place, place + first] = -torch.inf
        positive = ids[:, None] == clusters
        positive[place, place + first] = False
        mean_positive = logits.masked_fill(~positive, 0).sum(1) / positive.sum(1)
        return (logits.logsumexp(1) - mean_positive).sum()

    parts = [_checkpointed(terms, z[i : i + block], clusters[i : i + block], i) for i in range(0, len(z), block)]
    return torch.stack(parts).sum() / len(z)


def chunked_two_sets(anchors: Tensor, contrasts: Tensor, temperature: float) -> Tensor:
    """`two_sets` in blocks of rows; each block gives its rows' log-sum-exps and its part of every column's."""
    x, y = _unit(anchors), _unit(contrasts)
    block = block_rows(len(y))

    def sums(rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = (rows / temperature) @ y.T
        return logits.logsumexp(1), logits.logsumexp(0)

    by_row, by_column = zip(*(_checkpointed(sums, x[i : i + block]) for i in range(0, len(x), block)), strict=True)
    positive = (x * y).sum(1) / temperature
    return (torch.cat(by_row) + torch.stack(by_column).logsumexp(0)).mean() / 2 - positive.mean()


def chunked_queue(anchors: Tensor, keys: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """`queue` in blocks of rows."""
    z, stored = _unit(anchors), _unit(stored)
    positive = (z * _unit(keys)).sum(1) / temperature
    block = block_rows(len(stored))

    def log_sums(rows: Tensor) -> Tensor:
        return ((rows / temperature) @ stored.T).logsumexp(1)

    negatives = torch.cat([_checkpointed(log_sums, z[i : i + block]) for i in range(0, len(z), block)])
    return (torch.logaddexp(negatives, positive) - positive).mean()


def linear_cross_entropy_two_sets(anchors: Tensor, contrasts: Tensor, temperature: float) -> Tensor:
    """`two_sets` with the other set as the weight of a classifier, and torch's own chunking."""
    x, y = _unit(anchors), _unit(contrasts)
    target = torch.arange(len(x), device=x.device)
    options = torch.nn.LinearCrossEntropyOptions()
    there = F.linear_cross_entropy(x / temperature, y, target, options=options)
    back = F.linear_cross_entropy(y / temperature, x, target, options=options)
    return (there + back) / 2
