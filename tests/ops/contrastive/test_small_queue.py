"""MoCo's loss on a CPU in one call of the engine: its results, which calls take it, and what may happen around them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.losses import small as losses_small
from fastcl.ops.backends import choose, native
from fastcl.ops.contrastive import direct
from tests.support.strategies import generator

pytestmark = pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
N, M, D = 9, 21, 13


def x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def queue(size: int = M, count: int = M, dtype: torch.dtype = torch.float32, **stored: Any) -> fastcl.MemoryQueue:
    memory = fastcl.MemoryQueue(size, D, dtype=dtype, **stored)
    memory.enqueue(x(count, D, dtype=dtype, seed=7), **{name: torch.arange(count) for name in stored})
    return memory


def bank() -> fastcl.MemoryBank:
    memory = fastcl.MemoryBank(M, D)
    memory.update(torch.arange(M), x(M, D, seed=7))
    return memory


def off(monkeypatch) -> None:
    monkeypatch.setattr(losses_small, "_queue_on_cpu", lambda *_: None)


def took(loss: Tensor) -> bool:
    return loss.grad_fn is not None and "SmallQueueMean" in loss.grad_fn.name()


def moco(query: Tensor, key: Tensor, contrasts: Any, temperature: Any = 0.3, **options: Any) -> Tensor:
    if isinstance(contrasts, Tensor):
        options["contrast_clusters"] = torch.full((len(contrasts),), -1)
    return cluster_infonce(query, positives=key, contrasts=contrasts, temperature=temperature, **options)


CASES = {
    "a queue": lambda: (x(N, D), x(N, D, seed=1), queue()),
    "a queue not yet full": lambda: (x(N, D), x(N, D, seed=1), queue(3 * M)),
    "a queue that has wrapped": lambda: (x(N, D), x(N, D, seed=1), queue(M, M + 4)),
    "a queue in half precision": lambda: (x(N, D), x(N, D, seed=1), queue(dtype=torch.bfloat16)),
    "rows": lambda: (x(N, D), x(N, D, seed=1), x(M, D, seed=2)),
    "strided rows": lambda: (x(2 * N, D + 3)[::2, 1 : D + 1], x(N, D, seed=1), x(D, M, seed=2).T),
    "double": lambda: tuple(x(n, D, dtype=torch.float64, seed=seed) for seed, n in enumerate((N, N, M))),
    "one of each": lambda: (x(1, 1), x(1, 1, seed=1), x(1, 1, seed=2)),
    "many": lambda: (x(130, 67), x(130, 67, seed=1), x(1000, 67, seed=2)),
    "converged": lambda: (x(N, D), x(N, D) + 1e-3 * x(N, D, seed=1), x(M, D, seed=2)),
    "the key is a contrast too": lambda: (x(N, D), x(N, D, seed=1), x(N, D, seed=1)),
    "a row of zeros": lambda: (x(N, D) * (torch.arange(N)[:, None] != 2), x(N, D, seed=1), x(M, D, seed=2)),
    "a key of zeros": lambda: (x(N, D), x(N, D, seed=1) * (torch.arange(N)[:, None] != 2), x(M, D, seed=2)),
    "tiny rows": lambda: (x(N, D) * 1e-30, x(N, D, seed=1) * 1e-14, x(M, D, seed=2)),
    "large rows": lambda: (x(N, D) * 1e30, x(N, D, seed=1) * 1e15, x(M, D, seed=2)),
    "huge rows in double": lambda: tuple(row * 1e200 for row in CASES["double"]()),
}


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned temperature"])
@pytest.mark.parametrize("key_learns", [False, True], ids=["", "key learns"])
@pytest.mark.parametrize("temperature", [0.3, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_results_are_the_formula_and_those_of_the_usual_way(
    case, temperature, key_learns, learned, monkeypatch
) -> None:
    query, key, contrasts = CASES[case]()
    leaves = [query.requires_grad_()] + ([key.requires_grad_()] if key_learns else [])
    scale: Any = temperature
    if learned:
        leaves.append(scale := Parameter(torch.tensor([temperature])))
    got = moco(query, key, contrasts, scale)
    assert took(got)
    with torch.no_grad():
        assert torch.equal(moco(query, key, contrasts, scale), got)
    gradients = torch.autograd.grad(got * -2.5, leaves)
    off(monkeypatch)
    usual = moco(query, key, contrasts, scale)
    assert not took(usual)
    assert (got.dtype, got.shape) == (usual.dtype, usual.shape)
    expected = torch.autograd.grad(usual * -2.5, leaves)
    exact, derivatives = formula(query, key, contrasts, scale, leaves)
    slack = 1e-12 if query.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.double(), exact, rtol=10 * slack, atol=slack)
    for leaf, a, b, c in zip(leaves, gradients, expected, derivatives, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) == (leaf.dtype, leaf.shape)
        # The derivatives in unit rows are about loss / temperature; normalisation takes off what lies along the rows.
        size = max(c.abs().max().item(), exact.item() / temperature / leaf.detach().abs().max().item())
        atol = slack * size * max(10, 1 / temperature)
        torch.testing.assert_close(a.double(), c.double().reshape(a.shape), rtol=0, atol=atol)


def formula(query, key, contrasts, scale, leaves) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients in float64; in self-made units of rows, so that squares neither over- nor underflow."""

    def unit(rows: Tensor) -> Tensor:
        wide = rows.double()
        size = wide.detach().abs().amax(1, keepdim=True)
        inside = wide / torch.where(size == 0, 1, size)
        norm = torch.where(size == 0, 1, inside.norm(dim=1, keepdim=True))
        floored = norm * torch.where(size == 0, 1, size) < 1e-12
        return torch.where(floored, wide / 1e-12, inside / norm) * (size != 0)

    stored = isinstance(contrasts, fastcl.MemoryQueue)
    rows = contrasts.stored(False).rows.double() if stored else unit(contrasts)
    a, b = unit(query), unit(key)
    temperature = scale.double() if isinstance(scale, Tensor) else scale
    log_ratio = ((a @ rows.T) / temperature).logsumexp(1) - (a * b).sum(1) / temperature
    exact = torch.logaddexp(log_ratio, torch.zeros_like(log_ratio)).mean()  # exact where the positives dominate, too
    return exact.detach(), torch.autograd.grad(exact * -2.5, leaves)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_inner_products_and_threads(threads: int, normalize: bool, monkeypatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(native, "PRODUCTS", 1)
    try:
        torch.set_num_threads(threads)
        query, key, rows = x(70, D).requires_grad_(), x(70, D, seed=1).requires_grad_(), x(300, D, seed=2)
        got = moco(query, key, rows, normalize=normalize)
        assert took(got)
        gradients = torch.autograd.grad(got, (query, key))
        off(monkeypatch)
        usual = moco(query, key, rows, normalize=normalize)
        torch.testing.assert_close(got, usual)
        torch.testing.assert_close(gradients, torch.autograd.grad(usual, (query, key)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", ["query", "key", "contrasts"])
def test_not_a_number_shows(where: str, monkeypatch) -> None:
    values = {"query": x(N, D), "key": x(N, D, seed=1), "contrasts": x(M, D, seed=2)}
    values[where][3, 2] = torch.nan
    query, key = values["query"].requires_grad_(), values["key"].requires_grad_()
    loss = moco(query, key, values["contrasts"])
    assert took(loss)
    gradients = torch.autograd.grad(loss, (query, key))
    off(monkeypatch)
    usual = moco(query, key, values["contrasts"])
    assert loss.isnan()
    assert usual.isnan()
    for a, b in zip(gradients, torch.autograd.grad(usual, (query, key)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_the_loss_of_the_preset() -> None:
    query, key = x(N, D).requires_grad_(), x(N, D, seed=1)
    for contrasts in (queue(), x(M, D, seed=2)):
        loss = fastcl.MoCoLoss(0.3)(query, key, contrasts)
        assert took(loss)
        torch.testing.assert_close(loss, moco(query, key, contrasts))


def test_a_queue_may_change_before_the_backward() -> None:
    query, key, memory = x(N, D).requires_grad_(), x(N, D, seed=1), queue()
    expected = torch.autograd.grad(moco(query, key, memory), query)[0]
    loss = moco(query, key, memory)
    memory.enqueue(key)
    first = torch.autograd.grad(loss, query, retain_graph=True)[0]
    memory.reset()
    again = torch.autograd.grad(loss, query)[0]
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)


def test_gradients_do_not_share_memory() -> None:
    query, key = x(N, D).requires_grad_(), x(N, D, seed=1)
    loss = moco(query, key, queue())
    first = torch.autograd.grad(loss, query, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, query)[0], kept)


def test_rows_that_change_before_the_backward_raise() -> None:
    leaf, key = x(N, D).requires_grad_(), x(N, D, seed=1)
    query = leaf * 2
    loss = moco(query, key, queue())
    with torch.no_grad():
        query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_raises() -> None:
    query = x(N, D).requires_grad_()
    (gradient,) = torch.autograd.grad(moco(query, x(N, D, seed=1), queue()), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|once|second"):
        gradient.sum().backward()


OTHERS = {
    "clusters": {"clusters": torch.arange(N), "contrasts": queue(clusters=True)},
    "ids": {"ids": torch.arange(N), "contrasts": queue(ids=True)},
    "negatives alone": {"denominator": "negatives"},
    "a margin": {"margin": 0.1},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weights": torch.ones(N)},
    "a sum": {"reduction": "sum"},
    "half precision": {"embeddings": x(N, D, dtype=torch.bfloat16), "positives": x(N, D, dtype=torch.bfloat16)},
    "views": {"embeddings": x(N, 2, D), "positives": x(N, 2, D)},
    "columns apart": {"embeddings": x(D, N).T},
    "a contrast of a cluster": {"contrasts": x(M, D), "contrast_clusters": torch.arange(-1, M - 1)},
    "contrasts that learn": {"contrasts": x(M, D).requires_grad_(), "contrast_clusters": torch.full((M,), -1)},
    "contrasts of samples": {"contrasts": x(M, D)},
    "an empty queue": {"contrasts": fastcl.MemoryQueue(M, D)},
    "a bank": {"contrasts": bank()},
    "a list": {"contrasts": [queue()]},
    "hard negatives": {"hard_negatives": x(N, 2, D)},
    "no anchors": {"embeddings": x(0, D), "positives": x(0, D)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_calls_go_the_usual_way(case: str) -> None:
    arguments = {"embeddings": x(N, D), "positives": x(N, D, seed=1), "contrasts": queue(), **OTHERS[case]}
    loss = cluster_infonce(arguments.pop("embeddings").requires_grad_(), **arguments)
    assert not took(loss)


def test_a_scale_that_learns_in_a_large_problem_goes_the_usual_way(monkeypatch) -> None:
    monkeypatch.setattr(direct, "AT_ONCE", N * M * D - 1)
    query, temperature = x(N, D).requires_grad_(), Parameter(torch.tensor(0.3))
    assert not took(moco(query, x(N, D, seed=1), queue(), temperature))
    assert took(moco(query, x(N, D, seed=1), queue(), temperature.detach()))


def test_with_statistics_the_loss_is_the_same_to_the_bit(monkeypatch) -> None:
    query, key, memory = x(N, D).requires_grad_(), x(N, D, seed=1), queue()
    loss, stats = fastcl.MoCoLoss(0.3)(query, key, memory, return_stats=True)
    alone = fastcl.MoCoLoss(0.3)(query, key, memory)
    assert took(loss)
    assert torch.equal(loss, alone)
    assert torch.equal(*(torch.autograd.grad(of, query)[0] for of in (loss, alone)))
    off(monkeypatch)
    usual, expected = fastcl.MoCoLoss(0.3)(query, key, memory, return_stats=True)
    assert not took(usual)
    assert stats.scalars("") == expected.scalars("")
    with pytest.raises(TypeError, match="return_stats"):
        fastcl.MoCoLoss(0.3)(query, key, memory, return_stats=1)


def test_tracers_and_backends_go_the_usual_way() -> None:
    query, key, memory = x(N, D).requires_grad_(), x(N, D, seed=1), queue()
    with fastcl.use_backend("chunked"):
        assert not took(moco(query, key, memory))
    rows = x(M, D, seed=2)
    compiled = torch.compile(lambda q: moco(q, key, rows), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), moco(query, key, rows))


def test_under_autocast() -> None:
    query, key, memory = x(N, D).requires_grad_(), x(N, D, seed=1), queue()
    with torch.autocast("cpu", torch.bfloat16):
        loss = moco(query, key, memory)
    torch.testing.assert_close(loss, moco(query, key, memory))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "m", "d"), [(256, 64, 64), (500, 400, 30), (1024, 128, 8), (200, 16, 40), (512, 512, 16)]
)
def test_the_engine_stays_within_its_workspace(n: int, m: int, d: int, threads: int, monkeypatch) -> None:
    behind = []

    def run(call: Any) -> None:
        room = torch.full((call.workspace + 65536,), 165, dtype=torch.uint8)
        call.run(room.data_ptr())
        behind.append(int((room[call.workspace :] != 165).sum()))

    monkeypatch.setattr(native, "run", run)
    monkeypatch.setattr(native, "threads", lambda *_: threads)
    for dtype in (torch.float32, torch.float64):
        query = x(n, d, dtype=dtype).requires_grad_()
        assert took(moco(query, x(n, d, dtype=dtype, seed=1), x(m, d, dtype=dtype, seed=2)))
    assert behind == [0, 0]


def test_gradients_are_freed_with_the_graph() -> None:
    query = x(N, D).requires_grad_()
    loss = moco(query, x(N, D, seed=1), queue())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_temperature_that_does_not_learn_may_change() -> None:
    query, temperature = x(N, D).requires_grad_(), torch.tensor(0.3)
    expected = torch.autograd.grad(moco(query, x(N, D, seed=1), queue()), query)[0]
    loss = moco(query, x(N, D, seed=1), queue(), temperature)
    temperature.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], expected)


def test_one_large_workspace_is_kept(monkeypatch) -> None:
    made = []
    empty = torch.empty

    def watched(size, *rest, **kwargs):
        result = empty(size, *rest, **kwargs)
        if kwargs.get("dtype") == torch.uint8:
            made.append(size)
        return result

    monkeypatch.setattr(native, "KEPT_WORKSPACE", 0)
    monkeypatch.setattr(native, "_spare", [])
    monkeypatch.setattr(torch, "empty", watched)
    for rows in (100, 50, 100):
        moco(x(N, D), x(N, D, seed=1), x(rows, D, seed=2))
    assert len(made) == 1
    moco(x(N, D), x(N, D, seed=1), x(5000, D, seed=2))
    assert len(made) == 2
    monkeypatch.setattr(native, "SPARE_WORKSPACE", made[1] - 1)
    moco(x(N, D), x(N, D, seed=1), x(5000, D, seed=2))
    assert len(made) == 3
