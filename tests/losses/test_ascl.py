"""Adaptive soft contrastive learning against its float64 formula, with all labels written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from fastcl.functional import ascl_loss
from tests.support.strategies import generator


def given(m: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    query, key = torch.randn(2, 6, 5, generator=generator(0), dtype=torch.float64).to(dtype)
    queue = F.normalize(torch.randn(m, 5, generator=generator(1), dtype=torch.float64), dim=1).to(dtype)
    return query.requires_grad_(), key, queue


def plain(query, key, queue, temperature=0.1, teacher_temperature=0.05, neighbors=1) -> Tensor:
    query, key, queue = (F.normalize(rows.double(), dim=1) if rows is not queue else rows.double()
                         for rows in (query, key, queue))  # fmt: skip
    p = (key @ queue.T / teacher_temperature).softmax(1)
    confidence = 1 + (p * p.log()).sum(1, keepdim=True) / math.log(len(queue))
    labels = torch.cat([torch.ones(len(query), 1), (neighbors * confidence * p).clamp(max=1)], 1)
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / temperature
    return -(labels / labels.sum(1, keepdim=True) * scores.log_softmax(1)).sum(1)


@pytest.mark.parametrize("options", [(0.1, 0.05, 1), (0.3, 0.02, 3), (0.2, 0.5, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_its_formula(options: tuple[float, float, int], dtype: torch.dtype, backend: str) -> None:
    query, key, queue = given(dtype=dtype)
    temperature, teacher_temperature, neighbors = options
    loss = fastcl.ASCLLoss(temperature, teacher_temperature=teacher_temperature, neighbors=neighbors, reduction="none")
    terms = loss(query, key, queue)
    wide = query.detach().double().requires_grad_()
    truth = plain(wide, key, queue, *options)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(terms.double(), truth, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    found = torch.autograd.grad((terms * weights).sum(), query)[0].double()
    expected = torch.autograd.grad((truth * weights).sum(), wide)[0]
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    assert (found - expected).norm() <= (tolerance + rounding) * expected.norm()
    torch.testing.assert_close(ascl_loss(query, key, queue, temperature=temperature,
        teacher_temperature=teacher_temperature, neighbors=neighbors, reduction="sum"), terms.sum())  # fmt: skip


def test_labels_are_cut_off_at_one() -> None:
    """Two equal rows of the queue are the key's, and 40 neighbours would give each of them a label above 1."""
    query, key, queue = given()
    queue[:2] = F.normalize(key[0], dim=0)
    assert plain(query, key, queue, neighbors=40)[0] != plain(query, key, queue, neighbors=2)[0]
    found = ascl_loss(query, key, queue, neighbors=40, reduction="none")
    torch.testing.assert_close(found, plain(query, key, queue, neighbors=40))


@pytest.mark.parametrize("m", [0, 1])
def test_small_queues(m: int) -> None:
    query, key, queue = given(m)
    stored = fastcl.MemoryQueue(4, 5, dtype=torch.float64)
    stored.enqueue(queue)
    loss = ascl_loss(query, key, stored)
    torch.testing.assert_close(loss, ascl_loss(query, key, queue))
    scores = torch.cat([(F.normalize(query, dim=1) * F.normalize(key, dim=1)).sum(1, keepdim=True),
                        F.normalize(query, dim=1) @ queue.T], 1) / 0.1  # fmt: skip
    # A single row has all of the softmax: its label is 1.
    torch.testing.assert_close(loss, -scores.log_softmax(1).mean())
    assert torch.autograd.grad(loss, query)[0].isfinite().all()


def test_an_update_after_the_forward_does_not_change_the_backward() -> None:
    query, key, queue = given()
    stored = fastcl.MemoryQueue(11, 5, dtype=torch.float64)
    stored.enqueue(queue)
    loss = ascl_loss(query, key, stored)
    stored.enqueue(torch.ones(11, 5, dtype=torch.float64))
    expected = torch.autograd.grad(ascl_loss(query, key, queue), query)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], expected)


def test_the_key_and_the_queue_have_no_gradient() -> None:
    query, key, queue = (rows.detach().requires_grad_() for rows in given())
    gradients = torch.autograd.grad(ascl_loss(query, key, queue), [query, key, queue], allow_unused=True)
    assert gradients[1:] == (None, None)


def test_repr() -> None:
    expected = "ASCLLoss(temperature=0.1, teacher_temperature=0.05, neighbors=1, reduction='mean')"
    assert repr(fastcl.ASCLLoss()) == expected


x = torch.randn(4, 3, generator=generator(0))
WRONG = {
    "temperature": (lambda: fastcl.ASCLLoss(0), "temperature: expected a positive number .*, got 0"),
    "teacher_temperature": (lambda: ascl_loss(x, x, x, teacher_temperature=-1), "teacher_temperature: expected a pos"),
    "neighbors": (lambda: fastcl.ASCLLoss(neighbors=0), "neighbors: expected at least 1, got 0"),
    "reduction": (lambda: fastcl.ASCLLoss(reduction="max"), "reduction: expected one of 'mean', 'sum', 'none', got"),
    "query": (lambda: ascl_loss(x[0], x, x), r"query: expected shape \[N, D\], got \[3\]"),
    "key": (lambda: ascl_loss(x, x[:2], x), r"key: expected shape \[4, 3\], as query, got \[2, 3\]"),
    "queue": (lambda: ascl_loss(x, x, [x]), "queue: expected a tensor or a MemoryQueue, got list"),
    "queue rows": (lambda: ascl_loss(x, x, x[:, :2]), "queue: expected rows of dimension 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()
