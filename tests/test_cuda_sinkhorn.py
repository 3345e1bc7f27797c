"""Sinkhorn's CUDA kernels on the emulator: passes against the dense ones in float64, and all iterations in one launch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import emulating
from sinkhorn_passes import (
    PASSES,
    assignment_gradient,
    check,
    check_no_rows,
    column_sums,
    plain,
    problem,
    products,
    row_pass,
    spread,
)
from strategies import generator
from torch import Tensor

import fastcl
from fastcl.kernels import cuda_native, sinkhorn_cuda
from fastcl.kernels.sinkhorn_ops import choose


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    with emulating():
        yield


# One column; a row for a warp, the longest of them and one more; for all warps of a block; and too long for that.
@pytest.mark.parametrize(("n", "k"), [(5, 1), (131, 33), (37, 512), (7, 513), (3, 8192), (3, 8193)])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_a_pass_is_the_dense_one(which, n, k) -> None:
    check(which, problem(2 if k < 1000 else 1, n, k, torch.float32, plain), sinkhorn_cuda)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [20, 700])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_half_precision_and_strides(which, k, dtype) -> None:
    check(which, problem(2, 9, k, dtype, spread), sinkhorn_cuda)


@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_no_rows(which) -> None:
    check_no_rows(which, sinkhorn_cuda, 20)


@pytest.mark.parametrize("which", [column_sums, row_pass, products, assignment_gradient])
def test_chunks_add_up(which, monkeypatch) -> None:
    a = problem(1, 150, 70, torch.float32, plain)
    monkeypatch.setattr(sinkhorn_cuda, "LEAST_CHUNK", 1)
    for size in (17, 64, 512):
        monkeypatch.setattr(sinkhorn_cuda, "CHUNK", size)
        check(which, a, sinkhorn_cuda)


def test_whom_it_serves() -> None:
    with fastcl.use_backend("cuda"):
        assert choose(torch.device("cpu"), torch.float32) == "cuda"
        assert choose(torch.device("cpu"), torch.float64) == "chunked"
