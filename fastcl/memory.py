"""Rows kept from one step to the next, a queue of the latest ones or a bank with one for each sample; the nearest."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .kernels.checks import (
    ROW_DTYPES,
    check_flag,
    check_ids,
    check_rows,
    finite_number,
    positive_number,
    values_visible,
)
from .kernels.problem import inverse_norms
from .kernels.topk_ops import topk
from .memory_state import Memory, Stored, buffer_state, unchanged


class MemoryQueue(Memory):
    """The latest ``size`` rows, first in, first out (MoCo's and SwAV's queue, cross-batch memory, NNCLR's support set).

    ``ClusterInfoNCE()(query, positives=key, contrasts=queue)`` is MoCo; with ``clusters=True`` the queue's rows of an
    anchor's cluster are its positives, and ``ClusterInfoNCE()(z, labels, contrasts=queue)`` is a cross-batch memory.
    With ``ids=True`` an anchor is kept from stale copies of itself (``ids=`` of the loss).

    Rows are detached, normalised in float32 and then rounded to ``dtype``. A batch that is larger than the queue leaves
    its last ``size`` rows. What a loss was computed from does not change under its backward: enqueueing may come before
    it. Content, place and number of rows are buffers, and in ``state_dict``. Every process keeps a queue of its own:
    inside a ``DistributedDataParallel`` module, pass ``broadcast_buffers=False`` there.

    Args:
        size: rows that it holds at most, >= 1.
        dim: D of a row.
        dtype: of the stored rows: float64, float32, bfloat16 or float16.
        clusters: whether every row comes with a cluster id.
        ids: whether every row comes with a sample id.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Sources: He et al. 2020 (MoCo), Wang et al. 2020 (cross-batch memory), Dwibedi et al. 2021 (NNCLR).
    """

    cluster_ids: Tensor
    sample_ids: Tensor
    enqueued: Tensor  # rows that ever came: the next place is this modulo size
    counter = "enqueued"
    former_counters = 2  # place and count

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, clusters: bool = False, ids: bool = False
    ) -> None:
        super().__init__()
        size, dim = check_size("size", size), check_size("dim", dim)
        _check_dtype(dtype)
        check_flag("clusters", clusters)
        check_flag("ids", ids)
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype))
        for name, wanted in (("cluster_ids", clusters), ("sample_ids", ids)):
            self.register_buffer(name, torch.full((size,), -1, dtype=torch.int64) if wanted else None)
        self.register_buffer("enqueued", torch.zeros((), dtype=torch.int64))
        self._next, self._count = 0, 0  # where the next row goes, and how many there are

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def __len__(self) -> int:
        self._refresh()
        return self._count

    def __bool__(self) -> bool:  # an empty queue is a queue
        return True

    @property
    def embeddings(self) -> Tensor:
        """``[len, dim]``, oldest first; a copy."""
        return self._in_order(self.rows)

    @property
    def clusters(self) -> Tensor | None:
        """int64 ``[len]``, oldest first; negative: none. None if the queue stores none."""
        return None if self.cluster_ids is None else self._in_order(self.cluster_ids)

    @property
    def ids(self) -> Tensor | None:
        """int64 ``[len]``, oldest first; negative: none. None if the queue stores none."""
        return None if self.sample_ids is None else self._in_order(self.sample_ids)

    def _in_order(self, values: Tensor) -> Tensor:
        self._refresh()
        if self._count < self.size:  # nothing has been overwritten yet, and the oldest row is the first
            return values[: self._count].clone()
        return values.roll(-self._next, 0)

    def stored(self, kept: bool) -> Stored:
        self._refresh()
        count, buffers = self._count, self._buffers  # nn.Module's __getattr__ takes as long as a small operation
        rows, clusters, ids = buffers["rows"], buffers["cluster_ids"], buffers["sample_ids"]
        assert rows is not None
        if count < rows.shape[0]:
            rows = rows[:count]
            clusters, ids = (None if values is None else values[:count] for values in (clusters, ids))
        return Stored(
            rows.clone() if kept else rows,
            None if clusters is None else clusters.clone(),
            None if ids is None else ids.clone(),
            clusters is not None,
        )

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, clusters: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Appends rows ``[N, dim]``; the oldest ones make room.

        clusters, ids: ``[N]`` integers, negative: none; given where the queue stores them, and only there.
        """
        self._check_embeddings(embeddings)
        for name, value, place in (("clusters", clusters, self.cluster_ids), ("ids", ids, self.sample_ids)):
            if (value is None) != (place is None):
                wanted = f"None, as the queue was made without {name}" if place is None else "a tensor of integers"
                raise ValueError(f"{name}: expected {wanted}, got {'None' if value is None else 'a value'}")
            if value is not None:
                check_ids(name, value, len(embeddings), self.rows.device)
        count = min(len(embeddings), self.size)
        new = unit_rows(embeddings[len(embeddings) - count :], self.rows.dtype)
        parts = [(self.rows, new.to(self.rows.dtype))]
        for value, place in ((clusters, self.cluster_ids), (ids, self.sample_ids)):
            if value is not None:
                parts.append((place, value[len(value) - count :].to(torch.int64).clamp(min=-1)))
        with self._alone():
            self._refresh()
            before_end = min(count, self.size - self._next)
            for place, values in parts:
                place[self._next : self._next + before_end] = values[:before_end]
                if before_end < count:
                    place[: count - before_end] = values[before_end:]
            self._next = (self._next + count) % self.size
            self._count = min(self._count + count, self.size)
            self._count_on(count)

    @torch.no_grad()
    def reset(self) -> None:
        """Empties the queue: no rows, zeros in their places, no clusters, no ids."""
        with self._alone():
            self.rows.zero_()
            for ids in (self.cluster_ids, self.sample_ids):
                if ids is not None:
                    ids.fill_(-1)
            self._count_from_zero()

    def nearest(self, embeddings: Tensor) -> Tensor:
        """The stored row ``[N, dim]`` that is nearest to each of the embeddings ``[N, dim]`` (NNCLR); a copy.

        In cosine similarity. Of equals it is the one in the lowest place, the first stored until the queue has wrapped
        around; then places say nothing of age. ValueError while the queue is empty.
        """
        self._check_embeddings(embeddings)
        self._refresh()
        if self._count == 0:
            raise ValueError("nearest: expected at least one row in the queue, got none")
        rows = self.rows[: self._count]
        _, indices = topk_similarity(embeddings, rows, 1)  # a query's length does not change who is nearest
        return rows[indices[:, 0]]

    def _take(self, value: int) -> None:
        super()._take(value)
        value = max(value, 0)
        self._next, self._count = value % self.size, min(value, self.size)

    def _valid(self, value: int) -> bool:
        return value >= 0

    def _of_former(self, counters: list[int]) -> int | None:
        place, count = counters
        if not (0 <= place < self.size and (count == self.size or place == count) and count >= 0):
            return None
        return count if count < self.size else count + place

    def extra_repr(self) -> str:
        stored = "".join(
            f", {name}=True"
            for name, place in (("clusters", self.cluster_ids), ("ids", self.sample_ids))
            if place is not None
        )
        return f"{self.size}, {self.dim}, dtype={self.rows.dtype}{stored}, len={len(self)}"


class MemoryBank(Memory):
    """One row for each sample of a data set, a running mean of its embeddings (instance discrimination, PIRL).

    ``update`` sets row i to ``normalize(momentum * row_i + (1 - momentum) * normalize(embedding))``; the first update
    of a row stores the embedding itself, normalised. ``bank[indices]`` are rows, zeros where there is none yet.

    As ``contrasts=`` of a loss, a bank gives the rows that were ever updated. Their sample ids are their indices:
    ``ids=indices`` leaves an anchor's own stale row out. Their clusters are those that came with updates, or, in a
    bank that never got any, the indices: ``ClusterInfoNCE(0.07)(z, indices, contrasts=bank)`` is instance
    discrimination, an anchor's own row its positive.

    Rows are kept in ``dtype``, and meet in float32. All state is buffers, and in ``state_dict``.

    Args:
        num_samples: rows, >= 1.
        dim: D of a row.
        momentum: in [0, 1): the share of the old row.
        dtype: of the stored rows: float64, float32, bfloat16 or float16.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Sources: Wu et al. 2018 (instance discrimination), Misra and van der Maaten 2020 (PIRL).
    """

    cluster_ids: Tensor
    filled: Tensor
    clustered: Tensor  # 1 once a cluster came, else 0
    _filled_seen: tuple[Tensor, int, int] | None = None  # the state of `filled` in which every row was found filled
    counter = "clustered"
    former_counters = 1

    def __init__(
        self, num_samples: int, dim: int, *, momentum: float = 0.5, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        num_samples, dim = check_size("num_samples", num_samples), check_size("dim", dim)
        _check_dtype(dtype)
        self.momentum = finite_number("momentum", momentum)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number of at least 0 and below 1, got {momentum}")
        self.register_buffer("rows", torch.zeros(num_samples, dim, dtype=dtype))
        self.register_buffer("cluster_ids", torch.full((num_samples,), -1, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(num_samples, dtype=torch.bool))
        self.register_buffer("clustered", torch.zeros((), dtype=torch.int64))
        self._clustered = False  # whether a cluster ever came
        self._full = False  # whether every row is known to be filled

    @property
    def num_samples(self) -> int:
        return self.rows.shape[0]

    def __len__(self) -> int:
        """How many rows were ever updated."""
        self._refresh()
        if self._full:
            return self.num_samples
        count = int(self.filled.sum())
        self._found_full(count == self.num_samples)
        return count

    def __bool__(self) -> bool:
        return True

    __iter__ = None  # Python would try bank[0], bank[1], ...

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Rows ``[..., dim]`` of integers ``[...]``; a copy."""
        self._check_indices(indices)
        return self.rows[indices.to(torch.int64)]

    @property
    def embeddings(self) -> Tensor:
        """``[len, dim]``, the rows that were ever updated, by index; a copy."""
        return self.stored(kept=True).rows

    @property
    def clusters(self) -> Tensor:
        """int64 ``[len]``: of those rows; the indices, if no update ever brought clusters."""
        clusters = self.stored(kept=False).clusters
        assert clusters is not None
        return clusters

    @property
    def ids(self) -> Tensor:
        """int64 ``[len]``: the indices of those rows."""
        ids = self.stored(kept=False).ids
        assert ids is not None
        return ids

    def stored(self, kept: bool) -> Stored:
        self._refresh()
        indices = self._filled_rows()
        if len(indices) < self.num_samples:
            clusters = self.cluster_ids[indices] if self._clustered else indices
            return Stored(self.rows[indices], clusters, indices, self._clustered)
        clusters = self.cluster_ids.clone() if self._clustered else indices
        return Stored(self.rows.clone() if kept else self.rows, clusters, indices, self._clustered)

    def _filled_rows(self) -> Tensor:
        if self._full:
            return torch.arange(self.num_samples, device=self.rows.device)
        indices = self.filled.nonzero()[:, 0]
        self._found_full(len(indices) == self.num_samples)
        return indices

    def _found_full(self, full: bool) -> None:
        self._full = full
        if not torch.compiler.is_compiling():
            self._filled_seen = buffer_state(self.filled) if full else None

    def _refresh(self) -> None:
        super()._refresh()
        if not self._full or torch.compiler.is_compiling():
            return
        if not unchanged(self.filled, self._filled_seen):
            self._found_full(bool(self.filled.all()))

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Tensor, clusters: Tensor | None = None) -> None:
        """Moves the rows ``indices`` ``[N]`` towards embeddings ``[N, dim]``, in the order of the batch.

        An index that comes twice takes both updates, one after the other. clusters: ``[N]`` integers, negative: none;
        without them rows keep the cluster that they have.
        """
        self._check_embeddings(embeddings)
        self._check_indices(indices, len(embeddings))
        if clusters is not None:
            check_ids("clusters", clusters, len(embeddings), self.rows.device)
        if len(embeddings) == 0:
            return
        # All that can fail comes before the first change.
        indices = indices.to(torch.int64)
        ids = None if clusters is None else clusters.to(torch.int64).clamp(min=-1)
        new = unit_rows(embeddings, self.rows.dtype)
        indices, order = torch.sort(indices, stable=True)
        # of rows that take several updates: which one this is
        turn = torch.arange(len(indices), device=indices.device) - torch.searchsorted(indices, indices)
        with self._alone():
            self._refresh()
            for k in range(int(turn.max()) + 1):
                chosen = turn == k
                place, update = indices[chosen], new[order[chosen]]
                mixed = self.momentum * self.rows[place].to(update.dtype) + (1 - self.momentum) * update
                mixed = torch.where(self.filled[place][:, None], mixed * inverse_norms(mixed)[:, None], update)
                self.rows[place] = mixed.to(self.rows.dtype)
                self.filled[place] = True
                if ids is not None:
                    self.cluster_ids[place] = ids[order[chosen]]
            self._found_full(self._full)
            if ids is not None and not self._clustered:
                self._clustered = True
                self._count_on(1)

    @torch.no_grad()
    def reset(self) -> None:
        """Empties the bank: no row was ever updated, no cluster ever came."""
        with self._alone():
            self.rows.zero_()
            self.cluster_ids.fill_(-1)
            self.filled.zero_()
            self._found_full(False)
            self._count_from_zero()

    def _check_indices(self, indices: Any, length: int | None = None) -> None:
        if isinstance(indices, Tensor) and length is None:
            check_ids("indices", indices.reshape(-1), indices.numel(), self.rows.device)
        else:
            check_ids("indices", indices, 0 if length is None else length, self.rows.device)
        if values_visible(indices) and indices.numel():
            least, most = extremes(indices)
            if least < 0 or most >= self.num_samples:
                wrong = least if least < 0 else most
                raise ValueError(f"indices: expected numbers from 0 to {self.num_samples - 1}, got {wrong}")

    def _take(self, value: int) -> None:
        super()._take(value)
        self._clustered = value != 0

    def _valid(self, value: int) -> bool:
        return value in (0, 1)

    def _of_former(self, counters: list[int]) -> int | None:
        return counters[0] if counters[0] in (0, 1) else None

    def extra_repr(self) -> str:
        return f"{self.num_samples}, {self.dim}, momentum={self.momentum:g}, dtype={self.rows.dtype}"


def check_size(name: str, value: Any) -> int:
    """A positive integer, Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value if isinstance(value, int) else int(value)


def extremes(integers: Tensor) -> tuple[int, int]:
    """The least and the largest of one or more; torch has neither for uint16, uint32 and uint64."""
    integers = integers.to(torch.int64)
    return int(integers.min()), int(integers.max())


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")


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
    k = check_size("k", k)
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
    if isinstance(temperature, Tensor):
        raise TypeError("temperature: expected a number, got a tensor")
    temperature = positive_number("temperature", temperature)
    least, most = 0, -1
    if len(labels) and (num_classes is None or values_visible(labels)):
        least, most = extremes(labels)
    if num_classes is None:
        if least < 0:
            raise ValueError(f"labels: expected numbers of at least 0, got {least}")
        num_classes = max(most, 0) + 1
    num_classes = check_size("num_classes", num_classes)
    if least < 0 or most >= num_classes:
        wrong = least if least < 0 else most
        raise ValueError(f"labels: expected numbers from 0 to {num_classes - 1}, got {wrong}")
    values, indices = topk_similarity(unit_rows(queries), unit_rows(keys), k)
    weights = torch.softmax(values / temperature, dim=1)
    scores = weights.new_zeros(len(queries), num_classes)
    return scores.scatter_add_(1, labels.to(torch.int64)[indices], weights)


def unit_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows over their norms, detached, in float32, or float64 if that is their or the given dtype; zeros stay zeros."""
    wide = torch.float64 in (rows.dtype, dtype)
    rows = rows.detach().to(torch.float64 if wide else torch.float32)
    return rows * inverse_norms(rows)[:, None]
