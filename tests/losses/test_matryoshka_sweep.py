"""The sweep over all prefixes of `MatryoshkaLoss` against the formula in float64; calls that it leaves to a loop."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastcl
from fastcl import MatryoshkaLoss
from fastcl.losses import prefixes

DIMS, WEIGHTS = (5, 20, 9), (1.0, 0.5, 2.0)


def rows(n: int, seed: int, near: Tensor | None = None) -> Tensor:
    found = torch.randn(n, 23, generator=torch.Generator().manual_seed(seed))
    return found if near is None else near[torch.arange(n) % len(near)] + 0.05 * found


def formula(x: Tensor, y: Tensor, temperature: Tensor, symmetric: bool) -> Tensor:
    total = x.new_zeros(())
    for d, weight in zip(DIMS, WEIGHTS, strict=True):
        logits = normalize(x[:, :d]) @ normalize(y[:, :d]).T / temperature
        places = torch.arange(len(x))
        both = (logits, logits.T) if symmetric else (logits,)
        total = total + weight * torch.stack([cross_entropy(one, places) for one in both]).mean()
    return total


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call took the sweep."""
    calls: list[bool] = []

    def watched(*given: Any) -> Tensor | None:
        found = prefixes.one_sweep(*given)
        calls.append(found is not None)
        return found

    monkeypatch.setattr("fastcl.losses.matryoshka.one_sweep", watched)
    return calls


@pytest.mark.parametrize("converged", [False, True])
@pytest.mark.parametrize(("n", "m", "symmetric"), [(37, 37, False), (37, 37, True), (37, 50, False), (1, 1, True)])
def test_is_the_formula(
    n: int, m: int, symmetric: bool, converged: bool, swept: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "BLOCK", 16)
    x = rows(n, 0)
    leaves = [x, rows(m, 1, x if converged else None), torch.tensor([0.05])]
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = MatryoshkaLoss(fastcl.ClusterInfoNCE(symmetric=symmetric), DIMS, WEIGHTS)
    with fastcl.use_backend("chunked"):
        values = [loss(leaves[0], contrasts=leaves[1], temperature=leaves[2]) for _ in range(2)]
        found = [(value.detach(), *torch.autograd.grad(value, leaves)) for value in values]
    assert swept == [True, True]
    expected = formula(*wide, symmetric)
    for one, again, right in zip(
        *found, (expected.detach(), *torch.autograd.grad(expected.squeeze(), wide)), strict=True
    ):
        assert torch.equal(one, again)
        assert one.dtype == torch.float32
        assert (one.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positives_and_a_half_precision_temperature(dtype: torch.dtype, swept: list[bool]) -> None:
    """Each anchor's positive lies opposite, all negatives on the anchor: exp(2 / temperature) overflows float32."""
    x = torch.zeros(8, 23)
    x[:, :: DIMS[0]] = 1
    x += 0.01 * rows(8, 0)
    y = torch.cat([-x[:1], x[1:]])
    leaves = [x, y, torch.tensor(1 / 43.5, dtype=dtype)]
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with fastcl.use_backend("chunked"):
        value = MatryoshkaLoss(fastcl.ClusterInfoNCE(), DIMS, WEIGHTS)(*leaves[:1], contrasts=y, temperature=leaves[2])
    assert swept == [True]
    right = formula(*wide, False)
    torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=0)
    for one, gradient in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(right, wide), strict=True):
        allowed = 1e-5 + (2**-8 if one.dtype == torch.bfloat16 else 0)
        assert (one.double() - gradient).norm() <= allowed * gradient.norm()


def test_only_needed_gradients_and_no_rounding_by_autocast(swept: list[bool]) -> None:
    x, y = rows(9, 0).requires_grad_(), rows(9, 1)
    loss = MatryoshkaLoss(fastcl.ClusterInfoNCE(), DIMS)
    with fastcl.use_backend("chunked"):
        value = loss(x, contrasts=y)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = loss(embeddings=x, contrasts=y)
            (again,) = torch.autograd.grad(rounded, x)
        with torch.no_grad():
            assert torch.equal(loss(x, contrasts=y), value)
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            gradient.sum().backward()
    assert swept == [True] * 3
    assert torch.equal(value, rounded)
    assert torch.equal(gradient, again)
    assert not gradient[:, 20:].any()


LOOPS: dict[str, Any] = {
    "labels": lambda x, y: ({}, {"clusters": torch.arange(9) // 2}),
    "views": lambda x, y: ({}, {"embeddings": torch.stack((x, y), 1), "contrasts": None}),
    "float64": lambda x, y: ({}, {"embeddings": x.double()}),
    "bfloat16": lambda x, y: ({}, {"embeddings": x.bfloat16(), "contrasts": y.bfloat16()}),
    "a margin": lambda x, y: ({"margin": 0.2}, {}),
    "a sum": lambda x, y: ({"reduction": "sum"}, {}),
    "no normalisation": lambda x, y: ({"normalize": False}, {}),
    "more contrasts, both directions": lambda x, y: ({"symmetric": True}, {"contrasts": torch.cat((y, y + 1))}),
    "a low temperature": lambda x, y: ({}, {"temperature": 0.02}),
    "a row of zeros": lambda x, y: ({}, {"embeddings": x.index_fill(0, torch.tensor([3]), 0.0)}),
    "a prefix of zeros": lambda x, y: ({}, {"contrasts": y.index_fill(1, torch.arange(5), 0.0)}),
    "a row far out": lambda x, y: ({}, {"embeddings": x.index_fill(0, torch.tensor([3]), 1e25)}),
    "a row of NaN": lambda x, y: ({}, {"embeddings": x.index_fill(0, torch.tensor([3]), torch.nan)}),
    "an empty batch": lambda x, y: ({}, {"embeddings": x[:0]}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_other_calls_are_left_to_the_loop(name: str, swept: list[bool]) -> None:
    x, y = rows(9, 0), rows(9, 1)
    options, change = LOOPS[name](x, y)
    given = {"embeddings": x, "contrasts": y} | change
    loss = fastcl.ClusterInfoNCE(**options)
    with fastcl.use_backend("chunked"):
        found = MatryoshkaLoss(loss, DIMS)(**given)
        parts = [MatryoshkaLoss(loss, [d])(**given) for d in DIMS]
    assert not any(swept)
    torch.testing.assert_close(found, sum(parts), equal_nan=True)
    assert found.isnan() == (name == "a row of NaN")


def test_hooks_see_each_prefix(swept: list[bool]) -> None:
    loss, calls = fastcl.ClusterInfoNCE(), []
    loss.register_forward_hook(lambda *given: calls.append(given))
    with fastcl.use_backend("chunked"):
        MatryoshkaLoss(loss, DIMS)(rows(9, 0), contrasts=rows(9, 1))
    assert len(calls) == len(DIMS)
    assert not swept


def test_errors_are_those_of_the_loss() -> None:
    with fastcl.use_backend("chunked"):
        for change, text in (
            ({"temperature": 0.0}, "temperature: expected"),
            ({"contrasts": rows(8, 1)}, "contrasts: expected at least 9 rows"),
            ({"contrasts": rows(9, 1)[:, :3]}, "contrasts: expected"),
        ):
            with pytest.raises(ValueError, match=text):
                MatryoshkaLoss(fastcl.ClusterInfoNCE(), DIMS)(rows(9, 0), **{"contrasts": rows(9, 1)} | change)
