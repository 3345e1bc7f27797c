"""Rows whose squares exceed the range of their dtype are normalised like all others; norms are floored at 1e-12."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.ops.backends.rows import inverse_norms, unit_rows
from tests.support.backends import VARIANTS
from tests.support.emulated import on
from tests.support.oracle import cluster_infonce as formula


def rows(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


CLUSTERS = torch.arange(13) % 4
SOFT = torch.eye(4)[CLUSTERS] + 0.1
QUEUE = fastcl.MemoryQueue(6, 7)
QUEUE.enqueue(rows(6, 3))
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "self-contrast": lambda x, y, key: cluster_infonce(x, CLUSTERS),
    "two sets": lambda x, y, key: cluster_infonce(x, CLUSTERS, contrasts=y, symmetric=True),
    "a positive of its own": lambda x, y, key: cluster_infonce(x, CLUSTERS, contrasts=y, positives=key),
    "a queue": lambda x, y, key: fastcl.MoCoLoss(0.2)(x, key, QUEUE),
    "no clusters": lambda x, y, key: fastcl.uniformity(x),
    "assignments": lambda x, y, key: cluster_infonce(x, assignments=SOFT, contrasts=y),
}
PRESETS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "hard negatives": lambda x, y, key: fastcl.HardNegativeLoss()(x, CLUSTERS),
    "decoupled": lambda x, y, key: fastcl.DCLLoss()(x, key),
    "alignment": lambda x, y, key: fastcl.alignment(x, key),
    "beside a queue": lambda x, y, key: cluster_infonce(x, contrasts=[QUEUE, y]),
}
DTYPES = {
    "float32": (torch.float32, 2.0**70),
    "bfloat16": (torch.bfloat16, 2.0**70),
    "float64": (torch.float64, 2.0**600),
}


def check_powers(call: Callable[..., Tensor], dtype: torch.dtype, factor: float) -> None:
    """A power of two times either set of rows changes no bit of the loss, and divides the gradient by it."""
    inputs = [rows(13, 0, dtype), rows(16, 1, dtype), rows(13, 2, dtype)]
    factors = [torch.ones(len(x), 1, dtype=dtype) for x in inputs]
    for one, step in zip(factors, (2, 3, 1), strict=True):
        one[::step] = factor
    leaves = [x.clone().requires_grad_() for x in inputs]
    far = [(x * by).requires_grad_() for x, by in zip(inputs, factors, strict=True)]
    losses = call(*leaves), call(*far)
    assert losses[0].isfinite()
    assert torch.equal(*losses)
    found = [torch.autograd.grad(loss, of, allow_unused=True) for loss, of in zip(losses, (leaves, far), strict=True)]
    for plain, gradient, by in zip(*found, factors, strict=True):
        if plain is not None:
            assert torch.equal(plain, gradient * by)


@pytest.mark.parametrize("name", [*VARIANTS, "cuda"])
@pytest.mark.parametrize("kind", DTYPES)
def test_beyond_the_range(kind, name) -> None:
    with on(name):
        for what, call in CALLS.items():
            if (name, what) != ("cuda", "assignments"):  # an error, see test_cuda_emulator.py
                check_powers(call, *DTYPES[kind])


@pytest.mark.parametrize("call", PRESETS)
def test_beyond_the_range_in_presets(call) -> None:
    for kind in DTYPES.values():
        check_powers(PRESETS[call], *kind)


@pytest.mark.parametrize("name", [*VARIANTS, "cuda"])
@pytest.mark.parametrize("size", [1e-25, 1e38])
def test_ends_of_the_range(size, name) -> None:
    """Rows with norms below the floor keep their size; rows of the largest numbers are like all others."""
    x, y = rows(13, 0), rows(16, 1)
    x[::2] *= size / 3
    y[::3] *= size / 3
    x[3] = 0
    leaves, wide = ([t.to(dtype).requires_grad_() for t in (x, y)] for dtype in (torch.float32, torch.float64))
    truth = formula(wide[0], CLUSTERS, contrasts=wide[1], symmetric=True)
    with on(name):
        loss = cluster_infonce(leaves[0], CLUSTERS, contrasts=leaves[1], symmetric=True)
        found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    for gradient, true, of in zip(found, torch.autograd.grad(truth, wide), (x, y), strict=True):
        error, least = (gradient.double() - true).norm(dim=1), 1e-6 / of.double().norm(dim=1).clamp(min=1e-12)
        assert (error <= 1e-5 * true.norm(dim=1) + least + torch.finfo(torch.float32).tiny / 100).all()
        assert (gradient[(of == 0).all(1)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_norms(dtype, monkeypatch) -> None:
    """The same with and without reading values; for rows in range the same as torch's."""
    big = 1e30 if dtype == torch.float32 else 1e200
    x = torch.tensor([[3.0, 4.0], [3 * big, 4 * big], [3 / big, 4 / big], [0.0, 0.0]], dtype=dtype)
    expected = [0.2, 0.2 / big, 1e12, 0.0]
    looked_at = inverse_norms(x)
    monkeypatch.setattr("fastcl.ops.backends.rows.values_visible", lambda tensor: False)
    assert torch.equal(inverse_norms(x), looked_at)
    torch.testing.assert_close(looked_at, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=0)
    assert torch.equal(inverse_norms(x[:1]), looked_at[:1])
    with_infinity = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0]], dtype=dtype)
    assert not (with_infinity * inverse_norms(with_infinity)[:, None]).isfinite().all(1).any()


def test_stored_rows() -> None:
    x = rows(9, 0)
    far = x * 2.0**80
    assert torch.equal(unit_rows(far), unit_rows(x))
    queue, bank = fastcl.MemoryQueue(9, 7), fastcl.MemoryBank(9, 7)
    queue.enqueue(far)
    bank.update(torch.arange(9), far)
    assert torch.equal(queue.embeddings, unit_rows(x))
    assert torch.equal(bank[torch.arange(9)], unit_rows(x))
    labels = torch.arange(9) % 3
    assert torch.equal(fastcl.knn_predict(far, far, labels, k=3), fastcl.knn_predict(x, x, labels, k=3))


def test_compiled() -> None:
    compiled = torch.compile(fastcl.alignment, fullgraph=True, backend="aot_eager")
    x, y = rows(9, 0), rows(9, 1)
    torch.testing.assert_close(compiled(x * 2.0**70, y), fastcl.alignment(x, y))
