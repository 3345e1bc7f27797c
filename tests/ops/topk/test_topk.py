"""The largest inner products: exact, ties included, against plain sorting; kNN and the queue's nearest on top."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from fastcl import MemoryQueue, knn_predict, topk_similarity
from fastcl.ops.topk import chunked as topk_chunked
from fastcl.ops.topk import cpu as topk_cpu
from fastcl.ops.topk import triton as topk_triton
from fastcl.ops.topk.op import SEARCHES
from tests.support.backends import BACKENDS, VARIANTS, running
from tests.support.pairs import pairs
from tests.support.strategies import DTYPES, generator


def whole(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: every product is exact in every dtype, and many are equal."""
    return torch.randint(-2, 3, (n, d), generator=generator(seed)).to(dtype)


def plain(queries: Tensor, keys: Tensor, k: int, query_ids: Tensor | None, key_ids: Tensor | None) -> tuple:
    """Row by row in Python: sorted by value, then by index; (-inf, -1) for missing entries."""
    values, indices = [], []
    for i, row in enumerate((queries.double() @ keys.double().T).tolist()):
        own = -1 if query_ids is None else int(query_ids[i])
        pairs = [(v, j) for j, v in enumerate(row) if own < 0 or int(key_ids[j]) != own]
        best = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k]
        best += [(float("-inf"), -1)] * (k - len(best))
        values.append([v for v, _ in best])
        indices.append([j for _, j in best])
    shape = (len(queries), k)
    return torch.tensor(values, dtype=torch.float64).reshape(shape), torch.tensor(indices).reshape(shape).long()


@st.composite
def problems(draw):
    m = draw(st.integers(1, 70))
    most = draw(st.sampled_from([0, 3, 2**40]))
    return {
        "n": draw(st.integers(0, 70)), "m": m, "d": draw(st.sampled_from([1, 3, 16, 33])),
        "k": draw(st.integers(1, m)), "seed": draw(st.integers(0, 99)), "ids": draw(st.booleans()), "most": most,
        "dtypes": draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES))),
    }  # fmt: skip


@settings(max_examples=40)
@given(problems())
def test_exact_with_ties(problem) -> None:
    n, m, seed = problem["n"], problem["m"], problem["seed"]
    queries, keys = (
        whole(size, problem["d"], seed + i, dtype)
        for i, (size, dtype) in enumerate(zip((n, m), problem["dtypes"], strict=True))
    )
    ids = {}
    if problem["ids"]:
        g = generator(seed + 7)
        # few ids; the large ones differ only in their high bits
        few = [torch.randint(-1, 3, (size,), generator=g) for size in (n, m)]
        few = [torch.where(part > 0, part + (part % 2) * problem["most"], part) for part in few]
        ids = dict(zip(("query_ids", "key_ids"), few, strict=True))
    expected = plain(queries, keys, problem["k"], ids.get("query_ids"), ids.get("key_ids"))
    dtype = torch.float64 if torch.float64 in problem["dtypes"] else torch.float32
    for variant in VARIANTS:
        if variant == "triton" and seed > 30:  # the interpreter is slow
            continue
        with running(variant):
            values, indices = topk_similarity(queries, keys, problem["k"], **ids)
        assert values.dtype == dtype
        assert indices.dtype == torch.int64
        assert torch.equal(indices, expected[1]), variant
        assert torch.equal(values.double(), expected[0]), variant


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(3, 3001, 7, 40), (70, 1999, 130, 5), (301, 450, 20, 450)])
def test_random_rows(backend, dtype, n, m, d, k) -> None:
    if backend == "triton":  # interpreted
        n, m, k = min(n, 33), 150, min(k, 20)
    g = generator(0)
    queries, keys = (torch.randn(size, d, generator=g).to(dtype) for size in (n, m))
    values, indices = topk_similarity(queries, keys, k)
    exact = queries.double() @ keys.double().T
    truth = exact.topk(k).values
    tolerance = {"rtol": 0, "atol": 1e-12 * d if dtype == torch.float64 else 1e-5 * d**0.5}
    torch.testing.assert_close(values.double(), truth, **tolerance)
    torch.testing.assert_close(exact.gather(1, indices), truth, **tolerance)
    assert (indices.sort(1).values.diff(dim=1) > 0).all(), "an index came twice"
    assert (values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_queries_and_keys_cut_among_threads(backend, threads) -> None:
    if backend in ("reference", "triton"):
        pytest.skip("knows nothing of threads")
    before = torch.get_num_threads()
    queries, keys = whole(600, 64, 0), whole(701, 64, 1)
    try:
        torch.set_num_threads(threads)
        for few in (queries, queries[:5]):
            values, indices = topk_similarity(few, keys, 9)
            expected = (few @ keys.T).sort(dim=1, descending=True, stable=True)
            assert torch.equal(indices, expected.indices[:, :9])
            assert torch.equal(values, expected.values[:, :9])
    finally:
        torch.set_num_threads(before)


@pairs(
    shape=[(1, 1), (1, 2100), (2, 37), (7, 16), (8, 130), (9, 130)],
    backend=VARIANTS,
    dtype=[torch.float32, torch.float64, torch.bfloat16],
)
def test_few_queries(shape, backend, dtype) -> None:
    """Fewer than lanes: long rows, rows that end within a vector, keys apart in memory, a last group of few keys."""
    n, d = shape
    m = 150 if backend == "triton" else 1003
    queries, all_keys = whole(n, d, n, dtype), whole(2 * m, d + 3, d, dtype)
    ids = torch.arange(n), torch.arange(m) % (2 * n)
    for keys in (all_keys[::2, :d], all_keys[:m, 3:], all_keys[:m, :d].T.contiguous().T):
        values, indices = topk_similarity(queries, keys, 20, query_ids=ids[0], key_ids=ids[1])
        expected = plain(queries, keys, 20, *ids)
        assert torch.equal(indices, expected[1])
        assert torch.equal(values.double(), expected[0])


@pytest.mark.skipif("triton" not in SEARCHES or "triton" not in BACKENDS, reason="no interpreter")
def test_parts_of_the_columns_are_merged(monkeypatch) -> None:
    monkeypatch.setattr(topk_triton, "TILES", 1)
    for m, k in ((200, 9), (129, 70)):
        queries, keys, ids = whole(3, 4, 0), whole(m, 4, 1), (torch.arange(3), torch.arange(m) % 4)
        with fastcl.use_backend("triton"):
            values, indices = topk_similarity(queries, keys, k, query_ids=ids[0], key_ids=ids[1])
        expected = plain(queries, keys, k, *ids)
        assert torch.equal(indices, expected[1])
        assert torch.equal(values.double(), expected[0])


def test_blocks_of_queries_and_keys(monkeypatch) -> None:
    monkeypatch.setattr(topk_chunked, "KEYS", 7)
    monkeypatch.setattr(topk_chunked, "CPU_BLOCK", 1)
    monkeypatch.setattr(topk_chunked, "FEWEST_ROWS", 3)
    for dtype in (torch.float32, torch.float64):
        queries, keys = whole(10, 4, 0, dtype), whole(100, 4, 1, dtype)
        ids = torch.arange(10) % 4, torch.arange(100) % 4
        with fastcl.use_backend("chunked"):
            values, indices = topk_similarity(queries, keys, 20, query_ids=ids[0], key_ids=ids[1])
        expected = plain(queries, keys, 20, *ids)
        assert torch.equal(indices, expected[1])
        assert torch.equal(values.double(), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_are_none(backend, dtype) -> None:
    """NaN comes before all numbers; -inf comes after them and before inadmissible keys; -0 equals 0."""
    inf, nan = torch.inf, torch.nan
    keys = torch.tensor([0.0, -0.0, -inf, nan, inf, 1.0, -1.0, -nan, 0.0], dtype=dtype)[:, None]
    values, indices = topk_similarity(torch.ones(1, 1, dtype=dtype), keys, 9)
    assert indices.tolist() == [[3, 7, 4, 5, 0, 1, 8, 6, 2]]
    assert values[0, :2].isnan().all()
    assert values[0, 2:].tolist() == [inf, 1, 0, 0, 0, -1, -inf]
    ids = torch.tensor([5, 5, -1, 0, 5, 5, 5, 0, 5])
    values, indices = topk_similarity(torch.ones(1, 1, dtype=dtype), keys, 9, query_ids=torch.tensor([5]), key_ids=ids)
    assert indices.tolist() == [[3, 7, 2, -1, -1, -1, -1, -1, -1]]
    assert values[0, 2:].tolist() == [-inf] * 7


@pytest.mark.parametrize("k", [1, 2, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["any", "ascending", "descending"])
def test_numbers_that_are_none_among_many(backend, dtype, k, order) -> None:
    """Wherever NaN, infinities and equal numbers come among the keys, and for queries that fill no group."""
    n, m = (19, 80) if backend == "triton" else (83, 411)
    g = generator(k)
    keys = torch.randint(-9, 10, (m,), generator=g).to(dtype)
    if order != "any":
        keys = keys.sort(descending=order == "descending").values
    for value, count in ((torch.nan, 3), (torch.inf, 4), (-torch.inf, 4), (-0.0, 20)):
        keys[torch.randint(0, m, (count,), generator=g)] = value
    ids = torch.randint(0, 4, (n,), generator=g), torch.randint(0, 4, (m,), generator=g)
    queries = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)[torch.arange(n) % 3]
    for finite in (False, True):
        if finite:
            keys = keys.nan_to_num(3, 5, -5)
        products = queries[:, None] * keys
        for given_ids in ({}, {"query_ids": ids[0], "key_ids": ids[1]}):
            values, indices = topk_similarity(queries[:, None], keys[:, None], k, **given_ids)
            for i in range(n):
                admissible = torch.arange(m) if not given_ids else (ids[1] != ids[0][i]).nonzero()[:, 0]
                expected = products[i, admissible].sort(descending=True, stable=True)
                assert torch.equal(indices[i], admissible[expected.indices[:k]])
                torch.testing.assert_close(values[i], expected.values[:k], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 5])
def test_groups_of_queries(backend, k) -> None:
    """Of wide rows a cache holds few."""
    n, m, d = (20, 30, 150) if backend == "triton" else (331, 203, 3000)
    queries, keys = whole(n, d, 0), whole(m, d, 1)
    values, indices = topk_similarity(queries, keys, k)
    expected = (queries @ keys.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, expected.indices[:, :k])
    assert torch.equal(values, expected.values[:, :k])


def test_any_strides(backend) -> None:
    queries, keys = whole(10, 14, 0), whole(50, 14, 1)
    expected = topk_similarity(queries, keys, 6)
    strided = queries.T.contiguous().T, torch.stack((keys, keys + 1), dim=2)[..., 0]
    wide = torch.cat((keys, keys), 1)[:, :14]
    for q, y in (strided, (queries[:, :1].expand(-1, 14), keys), (queries, wide), (torch._neg_view(-queries), keys)):
        got = topk_similarity(q, y, 6)
        if q.stride() != (1, 0) and q.stride(1) != 0:
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        else:
            again = topk_similarity(q.contiguous(), y, 6)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_no_gradient_and_no_graph(backend) -> None:
    queries = whole(4, 5, 0).requires_grad_()
    values, _ = topk_similarity(queries, whole(9, 5, 1).requires_grad_(), 3)
    assert not values.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_operator(name) -> None:
    arguments = whole(5, 4, 0), whole(9, 4, 1), 3, torch.arange(5), torch.arange(9), name
    for given_ids in (arguments, (*arguments[:3], None, None, name)):
        torch.library.opcheck(torch.ops.fastcl.topk.default, given_ids)


def test_compiles_whole() -> None:
    def call(queries: Tensor, keys: Tensor) -> Tensor:
        values, indices = topk_similarity(queries * 2, keys, 3, query_ids=indices_of(queries), key_ids=indices_of(keys))
        return values.sum() + indices.sum()

    def indices_of(rows: Tensor) -> Tensor:
        return torch.arange(rows.shape[0])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for n in (5, 6):
        arguments = whole(n, 4, 0), whole(9, 4, 1)
        torch.testing.assert_close(compiled(*arguments), call(*arguments))


def test_memory_does_not_hold_all_products() -> None:
    if "cpu" not in SEARCHES:
        pytest.skip("no native module")
    sizes = []
    run = topk_cpu.native.run

    def watched(call):
        sizes.append(call.workspace)
        run(call)

    with pytest.MonkeyPatch.context() as patch, fastcl.use_backend("cpu"):
        patch.setattr(topk_cpu.native, "run", watched)
        topk_similarity(whole(64, 16, 0), whole(20_000, 16, 1), 5)
    assert sizes[0] < 64 * 20_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: topk_similarity(x, x, 5), r"^k: expected at most the number of keys, 4, got 5"),
        (lambda x: topk_similarity(x, x, 0), r"^k: expected at least 1, got 0"),
        (lambda x: topk_similarity(x, x, 2.0), r"^k: expected an integer"),
        (lambda x: topk_similarity(x, x[:, :2], 1), r"^keys: expected rows of dimension 3"),
        (lambda x: topk_similarity(x[0], x, 1), r"^queries: expected shape \[N, D\]"),
        (lambda x: topk_similarity(x, x, 1, query_ids=torch.arange(4)), r"^key_ids: expected a tensor, .* got None"),
        (lambda x: topk_similarity(x, x, 1, key_ids=torch.arange(4)), r"^query_ids: expected a tensor"),
        (
            lambda x: topk_similarity(x, x, 1, query_ids=torch.arange(3), key_ids=torch.arange(4)),
            r"^query_ids: expected shape \[4\], got \[3\]",
        ),
        (lambda x: knn_predict(x, x, torch.arange(3), 2), r"^labels: expected shape \[4\]"),
        (lambda x: knn_predict(x, x, torch.arange(4)), r"^k: expected at most the number of keys, 4, got 200"),
        (lambda x: knn_predict(x, x, torch.arange(4), 2, num_classes=3), r"^labels: expected numbers from 0 to 2"),
        (lambda x: knn_predict(x, x, torch.arange(4) - 1, 2), r"^labels: expected numbers of at least 0, got -1"),
        (lambda x: knn_predict(x, x, torch.full((4,), -1), 2), r"^labels: expected numbers of at least 0, got -1"),
        (lambda x: knn_predict(x, x, torch.arange(4), 2, temperature=0), r"^temperature: expected a positive"),
        (lambda x: MemoryQueue(3, 3).nearest(x), r"^nearest: expected at least one row"),
        (lambda x: MemoryQueue(3, 2).nearest(x), r"^embeddings: expected rows of dimension 2"),
    ],
)
def test_errors_name_the_argument(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(whole(4, 3, 0))


# kNN and the queue's nearest rows


@pytest.mark.parametrize("temperature", [0.07, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_votes_of_the_nearest(backend, temperature, dtype) -> None:
    g = generator(4)
    queries, keys = (torch.randn(n, 6, generator=g).to(dtype) for n in (17, 60))
    keys[3] = 0
    labels = torch.randint(0, 4, (60,), generator=g, dtype=torch.int32)
    scores = knn_predict(queries, keys, labels, 12, temperature, num_classes=6)
    x, y = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (queries, keys))
    values, indices = (x @ y.T).topk(12)
    votes = ((values - values[:, :1]) / temperature).exp()
    expected = (votes[..., None] * torch.nn.functional.one_hot(labels.long()[indices], 6)).sum(1)
    expected /= expected.sum(1, keepdim=True)
    assert scores.shape == (17, 6)
    atol = 1e-12 / temperature if dtype == torch.float64 else 1e-6 / temperature
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=atol)
    assert knn_predict(queries, keys, labels, np.int64(12)).shape == (17, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_votes_for_unsigned_labels(dtype) -> None:
    keys, labels = torch.randn(9, 3, generator=generator(0)), torch.arange(9) % 4
    assert torch.equal(knn_predict(keys, keys, labels.to(dtype), 3), knn_predict(keys, keys, labels, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_stored_rows(backend, dtype) -> None:
    queue = MemoryQueue(20, 5, dtype=dtype)
    queue.enqueue(torch.randn(33, 5, generator=generator(0)))
    embeddings = torch.randn(7, 5, generator=generator(1)).requires_grad_()
    found = queue.nearest(embeddings)
    similarity = torch.nn.functional.normalize(embeddings.double(), dim=1) @ queue.embeddings.double().T
    assert torch.equal(found, queue.embeddings[similarity.argmax(1)])
    assert found.dtype == dtype
    assert not found.requires_grad
    kept = found.clone()
    queue.enqueue(torch.randn(20, 5, generator=generator(2)))
    assert torch.equal(found, kept)
