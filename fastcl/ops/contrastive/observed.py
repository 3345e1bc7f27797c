"""Detached statistics of each row, for monitoring.

If `Problem.observe` is set, a backend returns `Side.observed` [10, S, N], in this order:

    max_pos, max_neg       largest logit over P_i and over N_i; -inf if the set is empty
    sum_pos, sum_neg       sums of the logits
    lse, entropy           log-sum-exp over A_i, and the entropy of its softmax in nats; -inf and 0 if A_i is empty
    num_pos, num_neg       sizes of the sets
    plain_pos, plain_neg   sums of the logits without bias, as subtracting a large bias from a sum would lose all digits

Statistics over disjoint sets of contrasts merge without the logits. Entropies merge by the grouping property, in which
nothing cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = ("max_pos", "max_neg", "sum_pos", "sum_neg", "lse", "entropy", "num_pos", "num_neg", "plain_pos", "plain_neg")


def part(observed: Tensor, name: str) -> Tensor:
    """The statistic `name` [S, N]."""
    return observed[PARTS.index(name)]


def observe(logits: Tensor, positive: Tensor, negative: Tensor, plain: Tensor | None = None) -> Tensor:
    """The statistics [10, S, N] of logits [S, N, M].

    positive, negative: the masks [N, M] of P and N. plain: the logits without bias; None if there is no bias.
    """
    (max_pos, sum_pos, num_pos), (max_neg, sum_neg, num_neg) = (
        (_largest(logits.masked_fill(~members, -torch.inf)), torch.where(members, logits, 0).sum(-1), members.sum(-1))
        for members in (positive, negative)
    )
    largest = torch.maximum(max_pos, max_neg)
    shift = largest.masked_fill(largest == -torch.inf, 0)
    below = torch.where(positive | negative, shift[..., None] - logits, torch.inf)
    weights = (-below).exp()
    total = weights.sum(-1)
    entropy = total.log() + torch.where(weights > 0, weights * below, 0).sum(-1) / total  # both parts are positive
    counts = [count.to(logits.dtype).expand_as(total) for count in (num_pos, num_neg)]
    entropy = torch.where(counts[0] + counts[1] > 0, entropy, 0)
    fields = max_pos, max_neg, sum_pos, sum_neg, shift + total.log(), entropy, *counts
    if plain is None:
        return torch.stack((*fields, sum_pos, sum_neg))
    return torch.stack((*fields, *(torch.where(members, plain, 0).sum(-1) for members in (positive, negative))))


def _largest(members: Tensor) -> Tensor:
    return members.amax(-1) if members.shape[-1] else members.sum(-1) - torch.inf


def nothing(like: Tensor, s: int, n: int) -> Tensor:
    """The statistics [10, S, N] of rows without contrasts."""
    observed = like.new_zeros(len(PARTS), s, n)
    for name in ("max_pos", "max_neg", "lse"):
        part(observed, name).fill_(-torch.inf)
    return observed


def merge(one: Tensor, other: Tensor) -> Tensor:
    """The statistics [10, S, N] over the union of two disjoint sets of contrasts."""
    lse = torch.logaddexp(part(one, "lse"), part(other, "lse"))

    def share(side: Tensor) -> Tensor:
        below = lse - part(side, "lse")
        weight = (-below).exp()
        no_mass = part(side, "lse") == -torch.inf
        return torch.where(no_mass, 0, weight * (part(side, "entropy") + below))

    def added(name: str) -> Tensor:
        return part(one, name) + part(other, name)

    def larger(name: str) -> Tensor:
        return torch.maximum(part(one, name), part(other, name))

    return torch.stack(
        (
            larger("max_pos"),
            larger("max_neg"),
            added("sum_pos"),
            added("sum_neg"),
            lse,
            share(one) + share(other),
            added("num_pos"),
            added("num_neg"),
            added("plain_pos"),
            added("plain_neg"),
        )
    )
