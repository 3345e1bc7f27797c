"""The CUDA kernel of top-k on the emulator, with the requirements of `test_topk.py`."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings

import fastcl
from fastcl import topk_similarity
from fastcl.ops.backends import choose
from fastcl.ops.topk import cuda as topk_cuda
from tests.ops.topk import test_topk
from tests.support.emulated import emulating
from tests.support.strategies import generator


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    with emulating(), fastcl.use_backend("cuda"):
        yield


@settings(max_examples=60)
@given(problem=test_topk.problems())
def test_exact_with_ties(problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_topk, "VARIANTS", ("cuda",))
        test_topk.test_exact_with_ties.hypothesis.inner_test(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d", "k"), [(3, 3001, 7, 40), (70, 1999, 130, 5), (33, 450, 20, 256)])
def test_random_rows(dtype, n, m, d, k) -> None:
    test_topk.test_random_rows("cuda", dtype, n, m, d, k)


def test_numbers_that_are_none() -> None:
    test_topk.test_numbers_that_are_none("cuda", torch.float32)


def test_any_strides() -> None:
    test_topk.test_any_strides("cuda")


@pytest.mark.parametrize("slots", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("falling", [False, True])
def test_lists_of_every_size_are_sorted_again_and_again(slots, falling) -> None:
    """If keys come in increasing order, each is appended and pushes out all before it; in the other order few are."""
    m = 5 * slots + 3
    keys = torch.arange(m, dtype=torch.float32)[:, None]
    queries = torch.tensor([[-1.0 if falling else 1.0], [0.0]])  # the second query has nothing but ties
    values, indices = topk_similarity(queries, keys, slots - 1)
    order = torch.arange(m) if falling else torch.arange(m - 1, -1, -1)
    assert torch.equal(indices, torch.stack((order, torch.arange(m)))[:, : slots - 1])
    assert torch.equal(values, (queries @ keys.T).gather(1, indices))


def test_parts_are_merged(monkeypatch) -> None:
    monkeypatch.setattr(topk_cuda, "TILES", 1)
    for m, k in ((200, 9), (129, 70)):
        queries, keys = test_topk.whole(3, 4, 0), test_topk.whole(m, 4, 1)
        ids = torch.arange(3), torch.arange(m) % 4
        values, indices = topk_similarity(queries, keys, k, query_ids=ids[0], key_ids=ids[1])
        expected = test_topk.plain(queries, keys, k, *ids)
        assert torch.equal(indices, expected[1])
        assert torch.equal(values.double(), expected[0])


def test_the_same_bits_in_whatever_order_threads_run(monkeypatch) -> None:
    queries, keys = (torch.randn(size, 37, generator=generator(size)) for size in (70, 300))
    first = topk_similarity(queries, keys, 50)
    for order in ("backward", "1"):
        monkeypatch.setenv("FASTCL_EMULATOR_ORDER", order)
        assert all(map(torch.equal, first, topk_similarity(queries, keys, 50)))


def test_whom_it_serves() -> None:
    """A larger k and float64 use blocks."""
    assert choose.choose_backend(torch.device("cpu"), torch.float32, "topk") == "cuda"
    keys = torch.randn(400, 3, generator=generator(0))
    for rows, k in ((keys, 300), (keys.double(), 3)):
        exact = (rows[:5] @ rows.T).sort(dim=1, descending=True, stable=True)
        assert torch.equal(topk_similarity(rows[:5], rows, k)[1], exact.indices[:, :k])
