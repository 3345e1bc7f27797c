"""The mean loss as one node of autograd's graph, with its gradient in the forward or in the backward."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.ops import small
from fastcl.ops.backends import choose, native
from fastcl.ops.contrastive import cpu, direct
from fastcl.ops.contrastive.records import Problem, Rows
from tests.support.backends import VARIANTS
from tests.support.pairs import pairs

WHEN = {"small": (1 << 60, 1 << 60), "at once": (0, 1 << 60), "when asked": (0, 0)}  # `small.MOST`, `direct.AT_ONCE`
KINDS = ("self", "views", "two sets", "constant contrasts", "symmetric", "momentum key", "bias", "ids")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DENOMINATORS = ("all", "negatives")


def decide(monkeypatch, when: str) -> None:
    most, at_once = WHEN[when]
    monkeypatch.setattr(small, "MOST", most)
    monkeypatch.setattr(direct, "AT_ONCE", at_once)
    if when == "when asked":
        monkeypatch.setattr(cpu, "keeps_products", lambda problem, needs: False)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def case(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, object]]:
    """Leaves, the embeddings first, and keywords. Some rows have no positive."""
    torch.manual_seed(3)
    n, m, d = 13, 17, 5
    z, temperature = leaf(n, d, dtype=dtype), torch.tensor(0.3, requires_grad=True)
    clusters = torch.tensor([0, 0, 1, 1, 1, 2, 2, -1, 3, 4, 4, 5, -7])
    options: dict[str, object]
    if kind == "self":
        return [z, temperature], {"clusters": clusters, "temperature": temperature}
    if kind == "views":
        z = leaf(n, 2, d, dtype=dtype)
        return [z, temperature], {"temperature": temperature}
    if kind == "constant contrasts":  # so many that a whole tile has contrasts of no anchor's cluster
        options = {"clusters": clusters, "contrasts": torch.randn(9 * m, d).to(dtype)}
        return [z], options | {"contrast_clusters": torch.arange(9 * m) // 2, "temperature": 0.3}
    y = leaf(m, d, dtype=dtype)
    options = {"contrasts": y, "temperature": temperature}
    if kind == "two sets":
        options |= {"clusters": clusters, "contrast_clusters": torch.arange(m) // 2}
    if kind == "symmetric":
        options |= {"clusters": clusters, "contrast_clusters": torch.arange(m) // 2, "symmetric": True}
    if kind == "momentum key":
        key = leaf(n, d, dtype=dtype)
        options |= {"positives": key, "contrast_clusters": torch.full((m,), -1)}
        return [z, y, key, temperature], options
    if kind == "bias":
        bias = leaf(m)
        return [z, y, bias, temperature], options | {"contrast_bias": bias}
    if kind == "ids":
        options |= {"ids": torch.arange(n), "contrast_ids": torch.arange(m) - 3}
    return [z, y, temperature], options


def results(leaves: list[Tensor], options: dict[str, object], factor: float = 1.0) -> list[Tensor]:
    loss = cluster_infonce(leaves[0], **options)
    return [loss.detach(), *torch.autograd.grad(loss * factor, leaves)]


@pairs(kind_and_when=list(product(KINDS, WHEN)), denominator=DENOMINATORS, dtype=DTYPES, backend=VARIANTS)
def test_one_node_is_the_formula(kind_and_when, dtype, denominator: str, backend: str, monkeypatch) -> None:
    kind, when = kind_and_when
    decide(monkeypatch, when)
    leaves, options = case(kind, dtype)
    options["denominator"] = denominator
    got = results(leaves, options, factor=-3.5)
    monkeypatch.setattr(direct.DirectMean, "apply", None)  # the formula must not call it
    weights = torch.ones(len(leaves[0]), dtype=torch.float64)  # weights of one: the formula step by step
    expected = results(leaves, options | {"weights": weights}, factor=-3.5)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.isfinite().all()
        slack = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}[a.dtype]
        torch.testing.assert_close(a, b, rtol=0, atol=slack * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("when", WHEN)
def test_it_is_one_node(when: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    loss = cluster_infonce(leaf(6, 2, 3))
    assert loss.grad_fn is not None
    assert loss.grad_fn.name() == ("SmallMeanBackward" if when == "small" else "DirectMeanBackward")


@pytest.mark.parametrize("when", WHEN)
def test_backward_twice_and_without_gradients(when: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    z = leaf(6, 2, 3)
    loss = cluster_infonce(z)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, second)
    with torch.no_grad():
        assert not cluster_infonce(z).requires_grad
    assert not cluster_infonce(z.detach()).requires_grad


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_looks_on_in_the_backward_alone(kind: str, when: str, monkeypatch) -> None:
    """The incoming gradient is then no plain tensor, or a mode records the operations on it."""
    decide(monkeypatch, when)
    leaves, options = case(kind, torch.float64)
    loss = cluster_infonce(leaves[0], **options)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    negated = torch.tensor(1j, dtype=torch.complex128).conj().imag  # -1, lazily
    for a, b in zip(torch.autograd.grad(loss, leaves, negated, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(a, -b)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    batched = torch.autograd.grad(loss, leaves, factors, retain_graph=True, is_grads_batched=True)
    for a, b in zip(batched, expected, strict=True):
        for row, factor in zip(a, factors, strict=True):
            torch.testing.assert_close(row, float(factor) * b)
    with _Names() as seen:
        again = torch.autograd.grad(loss, leaves)
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b)
    native = getattr(loss.grad_fn, "native", True)  # `SmallMean` always is
    assert ("fastcl.contrastive_stats_bwd.default" in seen.names) == (when == "when asked" or not native)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler reads .grad
@pytest.mark.parametrize("when", WHEN)
def test_compiled_autograd(when: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    z = leaf(16, 8)
    clusters = torch.arange(16) // 2
    (expected,) = torch.autograd.grad(cluster_infonce(z, clusters), z)

    @torch.compile(backend="eager")
    def step(loss: Tensor) -> None:
        loss.backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        step(cluster_infonce(z, clusters))
    torch.testing.assert_close(z.grad, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed(kind: str, when: str, backend: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    leaves, options = case(kind, torch.float64)
    expected = torch.autograd.grad(cluster_infonce(leaves[0], **options), leaves)
    loss = checkpoint(lambda z: cluster_infonce(z, **options), leaves[0], use_reentrant=False)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("when", WHEN)
def test_a_tiny_factor_takes_nothing_from_the_gradient(when: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    leaves, options = case("two sets", torch.float32)
    whole, small = results(leaves, options), results(leaves, options, factor=2.0**-100)
    for a, b in zip(whole[1:], small[1:], strict=True):
        torch.testing.assert_close(b * 2.0**100, a, rtol=1e-5, atol=1e-7 * a.abs().max().item())


@pytest.mark.parametrize("when", WHEN)
def test_second_derivatives_raise(when: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    z = leaf(6, 2, 3)
    (gradient,) = torch.autograd.grad(cluster_infonce(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("when", WHEN)
def test_nobody_counts(when: str, backend: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    z = leaf(4, 3)
    loss = cluster_infonce(z, torch.arange(4))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros(4, 3))


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_are_kept_while_they_are_few(symmetric: bool, monkeypatch) -> None:
    """200 rows cross the edge of a block; their 200² products are as many numbers as 2 * 400 rows of 50."""
    monkeypatch.setattr(direct, "AT_ONCE", 0)
    torch.manual_seed(0)
    found = {}
    for d in (49, 50):
        x, y = leaf(200, d), leaf(200, d)
        options = {
            "contrasts": y,
            "contrast_clusters": torch.arange(200) // 2,
            "symmetric": symmetric,
            "temperature": 0.2,
        }
        options["clusters"] = torch.arange(200) // 2
        found[d] = [x, y], options
        loss = cluster_infonce(x, **options)
        assert loss.grad_fn.at_once == (d == 50)
        (alone,) = torch.autograd.grad(loss, x, retain_graph=True)  # torch decides in the forward what is needed
        assert alone.isfinite().all()
    at_once = results(*found[50])
    assert not cluster_infonce(found[50][0][0], **found[50][1] | {"contrasts": torch.ones(200, 50)}).grad_fn.at_once
    decide(monkeypatch, "when asked")
    for a, b in zip(at_once, results(*found[50]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
@pytest.mark.parametrize("temperature", [0.2, 0.005])
@pytest.mark.parametrize(
    ("n", "kind"), [(61, "clusters"), (203, "clusters"), (397, "clusters"), (401, "ids"), (399, "tags")]
)
def test_products_of_pairs_are_kept_once(n: int, kind: str, temperature: float, monkeypatch) -> None:
    """In self-contrast those above the diagonal. The sizes cross edges of register tiles, blocks, threads' groups."""
    torch.manual_seed(0)
    d = (n + 3) // 4
    z, scale = leaf(n, d), torch.tensor(temperature, requires_grad=True)
    options: dict[str, object] = {"clusters": torch.arange(n) % (n // 3), "temperature": scale}
    if kind == "ids":
        options["ids"] = torch.arange(n) // 2 * (torch.arange(n) % 5 > 0) - 1
    if kind == "tags":
        options["clusters"] = torch.arange(n)[:, None] % 64 == torch.arange(64)
    exact = [leaf.detach().double().requires_grad_() for leaf in (z, scale)]
    with fastcl.use_backend("reference"):
        truth = results(exact, options | {"temperature": exact[1]})
    monkeypatch.setattr(direct, "AT_ONCE", 0)
    assert cluster_infonce(z, **options).grad_fn.at_once
    assert not cluster_infonce(leaf(n, d - 1), **options).grad_fn.at_once
    wide = leaf(n, d, dtype=torch.float64)
    assert cluster_infonce(wide, **options | {"temperature": exact[1]}).grad_fn.at_once

    def filled(call) -> None:
        workspace = torch.full((call.workspace,), 0xFF, dtype=torch.uint8)
        call.run(workspace.data_ptr())

    monkeypatch.setattr(native, "run", filled)
    for threads in (1, 2, 3):
        monkeypatch.setattr(native, "threads", lambda work, each=None, threads=threads: threads)
        for found, expected in zip(results([z, scale], options), truth, strict=True):
            error = (found.double() - expected).norm() / expected.norm()
            assert error < 2e-5 * max(1, 0.02 / temperature), (threads, error)
        for found, expected in zip(results(exact, options | {"temperature": exact[1]}), truth, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
def test_no_gradient_is_computed_that_nobody_wants(monkeypatch) -> None:
    calls = []

    def mean_loss(problem, needs):
        calls.append(list(needs))
        return native_mean_loss(problem, needs)

    monkeypatch.setattr(small, "MOST", 0)
    native_mean_loss = direct.cpu.mean_loss
    monkeypatch.setattr(direct.cpu, "mean_loss", mean_loss)
    z = leaf(4, 2, 3)
    cluster_infonce(z)
    assert calls.pop() == [True, *[False] * 7]
    with torch.no_grad():
        cluster_infonce(z)
    assert calls.pop() == [False] * 8
    cluster_infonce(z.detach())
    assert calls.pop() == [False] * 8
    decide(monkeypatch, "when asked")
    cluster_infonce(z)
    assert not calls
    with torch.no_grad():  # nothing is kept for a backward, whatever the size
        cluster_infonce(z)
    assert calls.pop() == [False] * 8


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
@pytest.mark.parametrize("byte", [0xFF, 0x7F])  # NaN; 3e38 as float32
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_that_was_not_written(kind: str, when: str, byte: int, monkeypatch) -> None:
    decide(monkeypatch, when)
    leaves, options = case(kind, torch.float32)
    expected = results(leaves, options)

    def filled(call) -> None:
        workspace = torch.full((call.workspace,), byte, dtype=torch.uint8)
        call.run(workspace.data_ptr())

    monkeypatch.setattr(native, "run", filled)
    for a, b in zip(results(leaves, options), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
def test_the_native_mean_refuses_calls_that_make_no_sense() -> None:
    n, m, d = 5, 7, 3
    z, y, clusters, others = torch.randn(n, d), torch.randn(m, d), torch.arange(n), torch.arange(m)
    anchors, contrasts = Rows(z, clusters, normalize=True), Rows(y, others, normalize=True)
    problem = Problem(anchors, contrasts, None, torch.tensor([2.0]), ("lse_all", "sum_pos"))
    numbers = direct.cpu.describe(problem)
    room = torch.zeros(1000).data_ptr()

    def call(kept=0, sums=0, valid=0, loss=0, factor=0, rows=0, columns=0) -> None:
        outputs = (False, kept, sums, valid, loss, factor, 0, 0, rows, columns, 0, 0)
        native.native_module().mean(native.engine()[0], numbers, outputs)

    call(loss=room, rows=room, columns=room)
    call(loss=room, kept=room, sums=room, valid=room)
    call(kept=room, sums=room, valid=room, factor=room, rows=room)
    for wrong, said in (
        ({"rows": room}, "loss: a null pointer"),
        ({"kept": room, "rows": room}, "loss_gradient: a null pointer"),
        ({"loss": room, "factor": room}, "before there is a loss"),
        ({"kept": room, "loss": room, "rows": room}, "between a call of the loss and one of the gradients"),
        ({"loss": room, "sums": room, "valid": room}, "between two calls only"),
        ({"kept": room, "sums": room, "factor": room, "rows": room}, "without their validity"),
        (
            {"kept": room, "sums": room, "valid": room, "factor": room, "rows": room, "columns": room},
            "anchors' gradient",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call(**wrong)


def test_large_batches_wait_for_the_backward() -> None:
    assert 512 * 512 * 128 <= direct.AT_ONCE < 1024 * 1024 * 128
    n = 1024
    loss = cluster_infonce(leaf(n, 128), torch.arange(n) // 2)
    assert loss.grad_fn is not None
    assert not loss.grad_fn.at_once


@pytest.mark.parametrize("when", WHEN)
def test_torchs_conventions_do_not_depend_on_the_batch(when: str, monkeypatch) -> None:
    decide(monkeypatch, when)
    z = leaf(6, 2, 3)
    loss = cluster_infonce(z)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    rows = leaf(6, 2, 3) * 1
    loss = cluster_infonce(rows)
    rows.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # functorch triggers it on first use
@pytest.mark.parametrize("function", [cluster_infonce, lambda z: fastcl.contrastive_stats(z[:, 0]).lse_all])
def test_forward_mode_raises(function) -> None:
    z = torch.randn(6, 2, 3)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(function, (z,), (z,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        function(forward_ad.make_dual(z, z))


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_the_value_does_not_cancel_as_pairs_converge(temperature: float) -> None:
    """If a pair has nearly all of the sum, lse - s_pos in float32 keeps at most two digits of the loss."""
    torch.manual_seed(7)
    z = torch.eye(31).repeat_interleave(2, 0) + 1e-3 * torch.randn(62, 31)
    clusters = torch.arange(62) // 2
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    positive = logits[torch.arange(62), torch.arange(62) ^ 1]
    others = logits.scatter(1, (torch.arange(62) ^ 1)[:, None], -torch.inf)
    expected = (others.logsumexp(1) - positive).exp().log1p().mean()
    for rows in (z, z.clone().requires_grad_()):
        got = cluster_infonce(rows, clusters, temperature=temperature)
        assert abs(got.double() / expected - 1) < 1e-4, (got, expected)
