"""The nearest one or two of few keys, for many queries: exact, ties and numbers that are none included."""

import pytest
import torch
from torch import Tensor

from fastcl import topk_similarity
from fastcl.ops.backends import native
from tests.support.strategies import generator


def whole(n: int, d: int, seed: int) -> Tensor:
    """Small whole numbers: every product is exact in every dtype, and many are equal."""
    return torch.randint(-2, 3, (n, d), generator=generator(seed)).float()


def check(queries: Tensor, keys: Tensor, k: int) -> None:
    values, indices = topk_similarity(queries, keys, k)
    products = queries.double() @ keys.double().T
    expected = products.sort(dim=1, descending=True, stable=True)
    found = min(k, len(keys))
    assert torch.equal(indices[:, :found], expected.indices[:, :found])
    torch.testing.assert_close(values[:, :found].double(), expected.values[:, :found], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices[:, found:], torch.full_like(indices[:, found:], -1))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("m", [2, 15, 16, 17, 33, 100, 263])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_whole_numbers(m: int, k: int, threads: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes cross the edges of tiles, of blocks and of the threads' shares."""
    monkeypatch.setattr(native, "threads", lambda work, of_one: threads)
    for n, d in ((601, 3), (590, 130)) if backend != "triton" else ((35, 3),):
        check(whole(n, d, m), whole(m, d, n), k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype: torch.dtype, backend: str) -> None:
    n = 30 if backend == "triton" else 450
    wide, keys = whole(n, 42, 0).to(dtype), whole(45, 21, 1).to(dtype)
    for queries in (wide[:, :21], wide[:, ::2], wide.T.contiguous().T[:, 21:], wide[:, :1].expand(n, 21)):
        for some in (keys, keys.T.contiguous().T, keys[::3], keys.double()):
            for k in (1, 2):
                check(queries, some, k)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [2, 3, 40])
def test_numbers_that_are_none(m: int, dtype: torch.dtype, k: int, backend: str) -> None:
    """Any mixture of NaN, infinities and equal numbers among the keys of a query."""
    n = 40 if backend == "triton" else 500
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf, 0.0, -0.0, 1.0], dtype=dtype)
    for seed in range(8):
        keys = special[torch.randint(0, 7, (m,), generator=generator(seed))]
        if seed == 7:
            keys = torch.full_like(keys, -torch.inf)
        queries = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)[torch.arange(n) % 3]
        check(queries[:, None], keys[:, None], k)


def test_random_rows(backend: str) -> None:
    n = 50 if backend == "triton" else 700
    queries, keys = (torch.randn(size, 257, generator=generator(size)) for size in (n, 90))
    values, indices = topk_similarity(queries, keys, 2)
    exact = queries.double() @ keys.double().T
    torch.testing.assert_close(values.double(), exact.topk(2).values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(exact.gather(1, indices), exact.topk(2).values, rtol=1e-5, atol=1e-4)
