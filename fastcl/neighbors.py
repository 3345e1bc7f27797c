"""Nearest rows: the largest inner products, and a kNN classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import LARGEST_COUNT, check_count, check_ids, check_rows, extremes, plain_number, values_visible
from .ops.backends.rows import unit_rows
from .ops.topk.op import topk


def topk_similarity(
    queries: Tensor, keys: Tensor, k: int, *, query_ids: Tensor | None = None, key_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest inner products of each query with the keys: exact, best first, without storing all N x M of them.

    Args:
        queries: ``[N, D]``; float64, float32, bfloat16 or float16, not normalised.
        keys: ``[M, D]``, not normalised.
        k: from 1 to M.
        query_ids, key_ids: ``[N]`` and ``[M]`` integers. Keys with the query's id are excluded (for instance the query
            itself, or its cluster). A negative id means none.

    Returns:
        (values ``[N, k]``, indices ``[N, k]``). Values are float32, or float64 if one set of rows is; indices are
        int64. Among equal values the lower index comes first; NaN comes before all numbers. If fewer than k keys are
        admissible, the rest is (-inf, -1). Values have no gradient; recompute them from the indices if you need one.

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
    """Weighted kNN classification by cosine similarity: class scores of the queries (Wu et al. 2018).

    The score of class c is the sum of ``exp(s / temperature)`` over the neighbours with label c, divided by the sum
    over all k neighbours. A row adds up to 1, and ``.argmax(1)`` is the prediction.

    Args:
        queries: ``[N, D]``, any floating dtype; queries and keys are normalised internally.
        keys: ``[M, D]``.
        labels: ``[M]`` integers from 0 to num_classes - 1; without num_classes any integers >= 0.
        k: from 1 to M.
        temperature: > 0.
        num_classes: C; None: one more than the largest label.

    Returns:
        ``[N, C]``, float32, or float64 if one set of rows is. Without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_rows("queries", queries)
    check_rows("keys", keys, like=queries)
    check_ids("labels", labels, keys.shape[0], queries.device)
    temperature = plain_number("temperature", temperature)
    least, most = 0, -1
    if labels.shape[0] and (num_classes is None or values_visible(labels)):
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
    scores = weights.new_zeros(queries.shape[0], num_classes)
    return scores.scatter_add_(1, labels.to(torch.int64)[indices], weights)
