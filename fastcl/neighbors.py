"""The nearest of stored rows: the largest inner products, and a vote among neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import LARGEST_COUNT, check_count, check_ids, check_rows, extremes, plain_number, values_visible
from .ops.backends.rows import unit_rows
from .ops.topk.op import topk

# The nearest of what is kept.


def topk_similarity(
    queries: Tensor, keys: Tensor, k: int, *, query_ids: Tensor | None = None, key_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest inner products of each query with keys, exact, best first, without storing the N x M of them.

    Args:
        queries: ``[N, D]``; float64, float32, bfloat16 or float16, taken as they come.
        keys: ``[M, D]``.
        k: from 1 to M.
        query_ids, key_ids: ``[N]`` and ``[M]`` integers; a key of the query's id is left out (itself, or all of its
            cluster); negative: no id.

    Returns:
        (values ``[N, k]``, indices ``[N, k]``): float32, float64 where a set of rows is float64; int64. Of equal
        values the lower index comes first, a NaN before all numbers. Where fewer than k keys are admissible the rest
        is (-inf, -1). No gradient flows through the values; take them again by index where one is wanted.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_rows("queries", queries)
    check_rows("keys", keys, like=queries)
    k = check_count("k", k)
    n, m = queries.shape[0], keys.shape[0]
    if k > m:
        raise ValueError(f"k: expected at most the number of keys, {m}, got {k}")
    if (query_ids is None) != (key_ids is None):
        absent, given = ("key_ids", "query_ids") if key_ids is None else ("query_ids", "key_ids")
        raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
    ids = []
    for name, value, length in (("query_ids", query_ids, n), ("key_ids", key_ids, m)):
        if value is not None:
            check_ids(name, value, length, queries.device)
        ids.append(None if value is None else value.to(torch.int64).clamp(min=-1))
    return topk(queries, keys, k, *ids)


def knn_predict(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    k: int = 200,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Class scores of queries by their k nearest keys in cosine similarity, weighted (Wu et al. 2018).

    The score of class c is the sum of ``exp(s / temperature)`` over those of the k neighbours that have label c, over
    the sum of all k: a row adds up to 1, and ``.argmax(1)`` is the prediction.

    Args:
        queries: ``[N, D]``; normalised here, as are the keys. Any floating dtype.
        keys: ``[M, D]``.
        labels: ``[M]`` integers from 0 to num_classes - 1, at least 0 without num_classes.
        k: from 1 to M.
        temperature: > 0.
        num_classes: C; None: one more than the largest label.

    Returns:
        ``[N, C]``, float32; float64 where a set of rows is float64. No gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_rows("queries", queries)
    check_rows("keys", keys, like=queries)
    check_ids("labels", labels, len(keys), queries.device)
    temperature = plain_number("temperature", temperature)
    least, most = 0, -1
    if len(labels) and (num_classes is None or values_visible(labels)):
        least, most = extremes(labels)
    if num_classes is None and least < 0:
        raise ValueError(f"labels: expected numbers of at least 0, got {least}")
    if num_classes is None and most >= LARGEST_COUNT:
        raise ValueError(f"labels: expected numbers below {LARGEST_COUNT}, got {most}")
    num_classes = max(most, 0) + 1 if num_classes is None else check_count("num_classes", num_classes)
    if least < 0 or most >= num_classes:
        wrong = least if least < 0 else most
        raise ValueError(f"labels: expected numbers from 0 to {num_classes - 1}, got {wrong}")
    values, indices = topk_similarity(unit_rows(queries), unit_rows(keys), k)
    weights = torch.softmax(values / temperature, dim=1)
    scores = weights.new_zeros(len(queries), num_classes)
    return scores.scatter_add_(1, labels.to(torch.int64)[indices], weights)
