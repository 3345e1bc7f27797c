"""`MatryoshkaLoss` against a loop over normalised prefixes."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl
from fastcl import MatryoshkaLoss

F64 = torch.float64
DIMS, WEIGHTS = (3, 8, 5), (1.0, 0.5, 2.0)


def rows(n: int, *shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, 8, generator=g, dtype=F64).to(dtype).requires_grad_()


def memories(d: int = 8) -> tuple[fastcl.MemoryQueue, fastcl.MemoryBank]:
    """Of rows, or of their prefixes."""
    queue, bank = fastcl.MemoryQueue(6, d, dtype=F64, clusters=True), fastcl.MemoryBank(9, d, dtype=F64)
    whole = normalize(rows(9, seed=5).detach(), dim=1)[:, :d]
    queue.enqueue(whole[:4], torch.arange(4) % 3)
    bank.update(torch.arange(9), whole)
    return queue, bank


def cut(x: Tensor, d: int) -> Tensor:
    return normalize(x[..., :d], dim=-1)


LABELS = torch.arange(9) % 3
SOFT = torch.rand(9, 8, dtype=F64, generator=torch.Generator().manual_seed(1))  # as wide as the rows
CALLS: dict[str, Any] = {
    "views": lambda loss, x, y, cut, d: loss(fastcl.ClusterInfoNCE())(torch.stack([x, y], 1)),
    "two sets": lambda loss, x, y, cut, d: loss(fastcl.ClusterInfoNCE(symmetric=True))(cut(x), contrasts=cut(y)),
    "inner products": lambda loss, x, y, cut, d: loss(fastcl.ClusterInfoNCE(normalize=False))(cut(x), LABELS),
    "soft": lambda loss, x, y, cut, d: loss(fastcl.ClusterInfoNCE())(cut(x), assignments=SOFT),
    "a list": lambda loss, x, y, cut, d: loss(fastcl.ClusterInfoNCE())(
        cut(x), LABELS, contrasts=[memories(d)[0], cut(y)], positives=cut(y), contrast_bias=SOFT[:, 0].repeat(2)[:13]
    ),
    "CLIP": lambda loss, x, y, cut, d: loss(fastcl.ClipLoss())(cut(x), cut(y), 3.0),
    "SigLIP": lambda loss, x, y, cut, d: loss(fastcl.SigLipLoss())(cut(x), cut(y), 3.0, -1.0),
    "SampledNCE": lambda loss, x, y, cut, d: loss(fastcl.SampledNCELoss(form="infonce"))(
        cut(x), torch.arange(9), memories(d)[1], negatives=torch.arange(9)[None].expand(9, 9)
    ),
    "MSN": lambda loss, x, y, cut, d: loss(fastcl.MSNLoss())(cut(x), cut(y), cut(x[:4])),
    "unreduced": lambda loss, x, y, cut, d: loss(fastcl.ClusterInfoNCE(reduction="none"))(cut(x), LABELS),
    "another library's": lambda loss, x, y, cut, d: loss(lambda a, b: (a @ b.T).logsumexp(1).mean())(cut(x), cut(y)),
}


@pytest.mark.parametrize("name", CALLS)
def test_is_the_sum_over_prefixes(name: str) -> None:
    call = CALLS[name]
    x, y = rows(9), rows(9, seed=1)
    found = call(lambda loss: MatryoshkaLoss(loss, DIMS, WEIGHTS), x, y, lambda z: z, 8)
    gradients = torch.autograd.grad(found.sum(), (x, y), allow_unused=True)
    expected = 0
    for d, weight in zip(DIMS, WEIGHTS, strict=True):
        if name == "views":
            expected = expected + weight * fastcl.ClusterInfoNCE()(torch.stack([cut(x, d), cut(y, d)], 1))
        else:
            expected = expected + weight * call(lambda loss: loss, x, y, lambda z, d=d: cut(z, d), d)
    torch.testing.assert_close(found, expected)
    for got, right in zip(gradients, torch.autograd.grad(expected.sum(), (x, y), allow_unused=True), strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            torch.testing.assert_close(got, right)


def test_statistics_and_a_learned_temperature() -> None:
    temperature = nn.Parameter(torch.tensor(0.3))
    loss = MatryoshkaLoss(fastcl.ClusterInfoNCE(temperature), DIMS)
    value, stats = loss(rows(9), LABELS, return_stats=True)
    value.backward()
    assert temperature.grad
    assert list(stats) == list(DIMS)
    assert all(isinstance(part, fastcl.LossStats) for part in stats.values())
    assert [name for name, _ in loss.named_parameters()] == ["criterion.temperature"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(rows(9), LABELS), loss(rows(9), LABELS))
    assert "dims=[3, 8, 5], weights=[1.0, 1.0, 1.0]" in repr(loss)


def test_memories_do_not_change() -> None:
    queue, _ = memories()
    state = {name: value.clone() for name, value in queue.state_dict().items()}
    loss = MatryoshkaLoss(fastcl.ClusterInfoNCE(), DIMS)(rows(9), LABELS, contrasts=queue)
    queue.enqueue(rows(2).detach(), torch.arange(2))
    assert len(queue) == 6
    loss.backward()
    assert queue.rows.shape == state["rows"].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_empty_batches(dtype: torch.dtype) -> None:
    loss = MatryoshkaLoss(fastcl.ClusterInfoNCE(), DIMS)
    x = rows(9, dtype=dtype)
    value = loss(x, LABELS)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), loss(x.double(), LABELS), rtol=1e-4, atol=1e-4)
    assert loss(x[:0], LABELS[:0]) == 0
    for d in DIMS:  # a NaN beyond the shorter prefixes
        bad = x.detach().clone()
        bad[0, 7] = torch.nan
        assert MatryoshkaLoss(fastcl.ClusterInfoNCE(), [d])(bad, LABELS).isnan() == (d == 8)


def test_compiles_in_one_graph() -> None:
    loss = MatryoshkaLoss(fastcl.ClusterInfoNCE(), DIMS)
    x = rows(9, dtype=torch.float32)
    found = torch.compile(lambda x: loss(x, LABELS), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, loss(x, LABELS))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ((3, [2]), TypeError, "criterion: expected a module or function, got int"),
        ((print, 3), TypeError, "dims: expected a list or tuple of integers, got int"),
        ((print, []), ValueError, "dims: expected at least one"),
        ((print, [0]), ValueError, "dims: expected at least 1, got 0"),
        ((print, [2, 2]), ValueError, r"dims: expected different numbers, got \[2, 2\]"),
        ((print, [2.0]), TypeError, "dims: expected an integer"),
        ((print, [2, 3], [1.0]), ValueError, "weights: expected 2 numbers, one for each of the dims, got 1"),
        ((print, [2], [-1.0]), ValueError, "weights: expected numbers of at least 0, got -1"),
        ((print, [2], 3), TypeError, "weights: expected a list or tuple of numbers, got int"),
    ],
)
def test_errors_name_the_argument(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MatryoshkaLoss(*given)


def test_errors_of_a_call() -> None:
    with pytest.raises(ValueError, match="dims: expected numbers of at most 8, the length of the rows, got 9"):
        MatryoshkaLoss(fastcl.ClusterInfoNCE(), [9])(rows(4), torch.arange(4))
    for first in (3, torch.zeros(3)):
        with pytest.raises(TypeError, match="embeddings: expected a tensor of rows"):
            MatryoshkaLoss(fastcl.ClusterInfoNCE(), [2])(first)
    with pytest.raises(TypeError, match="criterion: expected to return a tensor or a tuple, got dict"):
        MatryoshkaLoss(fastcl.ClipLoss(), [2])(rows(4), rows(4), 1.0, output_dict=True)
