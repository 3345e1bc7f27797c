"""Sinkhorn's Triton kernels, each pass against the dense one in float64. `test_sinkhorn.py` tests the whole."""

import pytest
import torch

import fastcl
from fastcl.ops.backends import choose, triton_launch
from fastcl.ops.sinkhorn import triton as sinkhorn_triton
from tests.support.sinkhorn_passes import (
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

pytestmark = pytest.mark.skipif(
    "triton" not in choose.AVAILABLE or not triton_launch.INTERPRETED, reason="Triton is not interpreted here"
)


# One column; rows held whole, the longest of them; rows in two tiles, the second of one column; in several tiles.
@pytest.mark.parametrize(("n", "k"), [(5, 1), (131, 33), (1, 64), (131, 65), (3, 300)])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_a_pass_is_the_dense_one(which, n, k) -> None:
    check(which, problem(2, n, k, torch.float32, plain), sinkhorn_triton)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [20, 70])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_half_precision_and_strides(which, k, dtype) -> None:
    check(which, problem(2, 9, k, dtype, spread), sinkhorn_triton)


@pytest.mark.parametrize("k", [20, 70])
@pytest.mark.parametrize("which", PASSES, ids=lambda which: which.__name__)
def test_no_rows(which, k) -> None:
    check_no_rows(which, sinkhorn_triton, k)


@pytest.mark.parametrize("which", [column_sums, row_pass, products, assignment_gradient])
@pytest.mark.parametrize("k", [20, 70])
def test_chunks_add_up(which, k, monkeypatch) -> None:
    a = problem(1, 400, k, torch.float32, plain)
    chunks = set()
    for size in (128, 512):
        monkeypatch.setattr(sinkhorn_triton, "CHUNK", size)
        monkeypatch.setattr(sinkhorn_triton, "LEAST_CHUNK", size)
        chunks.add(sinkhorn_triton._chunk(a["x"], sinkhorn_triton.columns_tile(True), 1))
        check(which, a, sinkhorn_triton)
    assert chunks == {128, 512}


def test_whom_it_serves() -> None:
    with fastcl.use_backend("triton"):
        assert choose.choose_backend(torch.device("cpu"), torch.float32, "sinkhorn") == "triton"
        assert choose.choose_backend(torch.device("cpu"), torch.float64, "sinkhorn") == "chunked"
