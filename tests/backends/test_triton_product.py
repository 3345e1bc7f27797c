"""Products in Triton's interpreter: what an element depends on, and which operands are possible."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcl.ops.backends import triton_interpreter, triton_launch
from fastcl.ops.backends.triton_tiles import Tile
from tests.support.strategies import generator

triton = pytest.importorskip("triton")
if not triton_launch.INTERPRETED:
    pytest.skip("Triton is not interpreted here", allow_module_level=True)

import triton.language as tl  # noqa: E402

from fastcl.ops.backends.triton_kernels import inner_products, load_rows  # noqa: E402

SIZE = 64


@triton.jit
def products_kernel(X, Y, OUT, D: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """OUT[i, j] = <x_i, y_j>, computed as in the kernels of the losses."""
    i0 = tl.program_id(0) * BLOCK_M
    j0 = tl.program_id(1) * BLOCK_N
    x = load_rows(X, i0, 0, SIZE, D, BLOCK_M, BLOCK_K, True, PRECISION, True)
    y = load_rows(Y, j0, 0, SIZE, D, BLOCK_N, BLOCK_K, True, PRECISION, True)
    dots = inner_products(X, Y, x, y, i0, j0, SIZE, SIZE, D, BLOCK_M, BLOCK_N, BLOCK_K, True, PRECISION, True)
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    tl.store(OUT + i[:, None] * SIZE + j[None, :], dots)


@triton.jit
def dot_kernel(A, B, ACC, OUT, SIZE: tl.constexpr):
    """OUT = ACC + A @ B of plain operands, without the library's functions."""
    i = tl.arange(0, SIZE)
    places = i[:, None] * SIZE + i[None, :]
    acc = tl.load(ACC + places)
    tl.store(OUT + places, tl.dot(tl.load(A + places), tl.load(B + places), acc, out_dtype=acc.dtype))


def launch(kernel, grid, monkeypatch, **given) -> None:
    """Launches a kernel as the losses do."""
    monkeypatch.setattr(triton_launch, "kernel_named", lambda name: kernel)
    triton_launch.launch("", Tile(0, 0, 0, 0, 4, 1), grid, given)


def products(x: Tensor, y: Tensor, tile: tuple[int, int], block_k: int, precision: str, monkeypatch) -> Tensor:
    out = torch.full((SIZE, SIZE), torch.nan)
    block_m, block_n = tile
    given = {"X": x, "Y": y, "OUT": out, "D": x.shape[1], "SIZE": SIZE, "PRECISION": precision}
    given |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    launch(products_kernel, (SIZE // block_m, SIZE // block_n), monkeypatch, **given)
    return out


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee")],
)
def test_a_kernels_product_does_not_depend_on_its_tiles(dtype, precision, monkeypatch) -> None:
    g = generator(0)
    x, y = (torch.randn(SIZE, 96, generator=g).to(dtype) for _ in range(2))
    whole = products(x, y, (64, 64), 32, precision, monkeypatch)
    for tile in ((16, 64), (32, 32)):
        assert torch.equal(products(x, y, tile, 32, precision, monkeypatch), whole), tile
    assert torch.equal(products(y, x, (64, 32), 32, precision, monkeypatch), whole.T)
    if precision == "tf32":
        x, y = (t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in (x, y))
    exact, terms = x.double() @ y.double().T, x.double().abs() @ y.double().abs().T
    assert ((whole - exact).abs() <= 2**-22 * terms).all()


@pytest.mark.parametrize("k", [16, 48, 80, 128, 208])
def test_an_element_does_not_depend_on_the_tile_it_is_cut_in(k) -> None:
    g = np.random.default_rng(0)
    x, y = (g.standard_normal((128, k), dtype=np.float32) for _ in range(2))
    whole = triton_interpreter.matrix_product(x, y.T)
    for m, n in itertools.product((16, 32, 64, 128), repeat=2):
        for i, j in itertools.product(range(0, 128, m), range(0, 128, n)):
            for columns in (y.T, np.ascontiguousarray(y.T)):
                part = triton_interpreter.matrix_product(x[i : i + m], columns[:, j : j + n])
                assert np.array_equal(part, whole[i : i + m, j : j + n]), (m, n, i, j)


def test_the_sum_of_any_number_of_terms() -> None:
    g = np.random.default_rng(0)
    for k in (1, 2, 3, 7, 16, 80, 129):
        a, b = g.integers(-9, 10, (17, k)).astype(np.float32), g.integers(-9, 10, (k, 5)).astype(np.float32)
        assert np.array_equal(triton_interpreter.matrix_product(a, b), a.astype(int) @ b.astype(int))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_operands_and_the_sum_that_they_are_added_to(dtype, monkeypatch) -> None:
    """Small integers, which are exact in every dtype."""
    g = generator(1)
    a, b = (torch.randint(-5, 6, (32, 32), generator=g).to(dtype) for _ in range(2))
    acc = torch.randint(-99, 100, (32, 32), generator=g).to(torch.int32 if dtype == torch.int8 else torch.float32)
    out = torch.zeros_like(acc)
    launch(dot_kernel, (1,), monkeypatch, A=a, B=b, ACC=acc, OUT=out, SIZE=32)
    assert torch.equal(out.double(), acc.double() + a.double() @ b.double())


def test_infinite_and_undefined_numbers_stay_what_they_are(monkeypatch) -> None:
    a, b, acc = torch.ones(16, 16), torch.ones(16, 16), torch.zeros(16, 16)
    a[2, 3], a[4, 5], b[5, 6] = torch.nan, torch.inf, 0.0
    out = torch.empty(16, 16)
    launch(dot_kernel, (1,), monkeypatch, A=a, B=b, ACC=acc, OUT=out, SIZE=16)
    torch.testing.assert_close(out, a @ b, rtol=0, atol=0, equal_nan=True)
    assert out[2].isnan().all()
    assert out[4, 6].isnan()
    assert (out[4, :6] == torch.inf).all()


@triton.jit
def broken_kernel(OUT):
    tl.store(OUT, tl.dot(OUT, OUT))


def test_the_interpreter_of_others_stays_as_it_is(monkeypatch) -> None:
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = builder.create_dot
    x = torch.randn(SIZE, 16, generator=generator(0))
    products(x, x, (64, 64), 16, "ieee", monkeypatch)
    assert builder.create_dot is before
    with pytest.raises(triton.runtime.errors.InterpreterError):
        launch(broken_kernel, (1,), monkeypatch, OUT=x)
    assert builder.create_dot is before
