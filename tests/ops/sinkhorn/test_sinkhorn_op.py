"""What torch and its tools require of `sinkhorn`: registration, compilation, strides, errors, memory."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl.ops.sinkhorn import chunked as sinkhorn_chunked
from fastcl.ops.sinkhorn.op import PASSES
from tests.support.backends import BACKENDS, VARIANTS, running
from tests.support.pairs import pairs
from tests.support.sinkhorn_oracle import log_domain
from tests.support.strategies import generator

FORWARD, BACKWARD = torch.ops.fastcl.sinkhorn_fwd.default, torch.ops.fastcl.sinkhorn_bwd.default


def x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def op_arguments(backend: str, dtype: torch.dtype, grad: bool, everything: bool, tol: float | None) -> tuple[Any, ...]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    differentiable = [
        x(2, 7, 5, dtype=dtype),
        torch.tensor(0.3, dtype=wide),
        x(2, 5, seed=1).to(wide).log_softmax(1),
        x(2, 7, seed=2).to(wide),
    ]
    if everything:
        differentiable[2][0, 3] = -torch.inf
    leaves = [value.requires_grad_(grad) for value in differentiable]
    name = backend if backend in PASSES else "chunked"  # as `sinkhorn` chooses
    return (*leaves, x(2, 5, seed=3).to(wide) if everything else None, 3, tol, "", name)


@pairs(
    backend=VARIANTS,
    tol=[None, 1e-3],
    everything=[False, True],
    grad=[False, True],
    dtype=[torch.bfloat16, torch.float64],
)
def test_opcheck_of_the_forward(backend, dtype, grad, everything, tol) -> None:
    torch.library.opcheck(FORWARD, op_arguments(backend, dtype, grad, everything, tol))


def backward_arguments(backend: str, tol: float | None, needs: list[bool]) -> tuple[Any, ...]:
    arguments = op_arguments(backend, torch.float32, False, True, tol)
    _, _, _, error, _, rows, columns = FORWARD(*arguments)
    grads = (x(2, 7, 5, seed=4), x(2, 7, seed=5), x(2, 5, seed=6))
    return (*arguments, error, rows, columns, *grads, needs)


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_opcheck_of_the_backward(backend, tol) -> None:
    torch.library.opcheck(BACKWARD, backward_arguments(backend, tol, [True] * 4))


@pytest.mark.parametrize("needed", range(4))
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_opcheck_of_one_gradient(backend, needed, tol) -> None:
    """The empty places of the other gradients are what tracing is told."""
    arguments = backward_arguments(backend, tol, [k == needed for k in range(4)])
    torch.library.opcheck(BACKWARD, arguments, test_utils=("test_schema", "test_faketensor"))


def test_second_derivatives_are_refused(backend) -> None:
    scores = x(6, 4).requires_grad_()
    result = fastcl.sinkhorn(scores)
    (gradient,) = torch.autograd.grad(result.assignments.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        gradient.sum().backward()


class Backends(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastcl":
            names = [argument.name for argument in func._schema.arguments]
            self.seen.append(args[names.index("backend")])
        return func(*args, **(kwargs or {}))


def test_the_backend_that_was_asked_for_runs(backend) -> None:
    scores = x(6, 4).requires_grad_()
    with Backends() as calls:
        result = fastcl.sinkhorn(scores)
    with fastcl.use_backend("reference"), Backends() as later:
        result.assignments.sum().backward()
    assert calls.seen == later.seen == [backend if backend in PASSES else "chunked"]
    assert set(PASSES) == {"reference", "chunked", "cpu", "triton", "cuda"}


@pytest.mark.parametrize(
    ("tol", "backend"), list(zip(cycle([None, 1e-3]), BACKENDS, strict=False)), indirect=["backend"]
)
def test_under_torch_compile(backend, tol) -> None:
    def loss(scores: Tensor, epsilon: Tensor, prior: Tensor) -> Tensor:
        result = fastcl.sinkhorn(scores, epsilon=epsilon, prior=prior, n_iters=4, tol=tol)
        return (result.assignments * torch.arange(scores.shape[1])).sum() + result.col_potential.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k in ((9, 5), (14, 6)):
        leaves = (x(n, k).requires_grad_(), torch.tensor(0.5, requires_grad=True), torch.ones(k).requires_grad_())
        one, other = compiled(*leaves), loss(*leaves)
        torch.testing.assert_close(one, other)
        for left, right in zip(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves), strict=True):
            torch.testing.assert_close(left, right)


def transposed(values: Tensor) -> Tensor:
    return values.T.contiguous().T


def spaced(values: Tensor) -> Tensor:
    return torch.stack([values, values.flip(0)], dim=-1).repeat(2, 1, 1)[: len(values), :, 0]


def negated(values: Tensor) -> Tensor:
    return torch._neg_view(-values)


@pairs(
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    layout=[transposed, spaced, negated],
    backend=VARIANTS,
)
def test_strides(backend, layout: Callable[[Tensor], Tensor], dtype) -> None:
    values = x(19, 21, dtype=dtype)
    outputs = []
    for scores in (values, layout(values)):
        leaf = scores.detach().requires_grad_()
        result = fastcl.sinkhorn(leaf, epsilon=0.5, init=layout(x(21, 21))[0])
        weight = x(19, 1, dtype=dtype).expand(19, 21) * 1  # a gradient of the result's shape
        for grad in (weight, layout(weight), weight[:, :1].expand(19, 21)):
            (gradient,) = torch.autograd.grad(result.assignments, leaf, grad, retain_graph=True)
            outputs.append((result.assignments.detach(), gradient))
    for other in outputs[1:]:
        for one, same in zip(outputs[0], other, strict=True):
            torch.testing.assert_close(one, same)


@pytest.mark.parametrize(
    ("variant", "threads"), [(variant, t) for variant in VARIANTS for t in (1, 2, 3) if variant != "triton" or t == 1]
)
def test_the_same_bits_from_run_to_run(variant, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = (301, 257) if variant != "triton" else (140, 70)  # more than one tile in the interpreter
        scores = x(*size).requires_grad_()
        weight = x(*size, seed=1)
        runs = []
        for _ in range(3):
            with running(variant):
                result = fastcl.sinkhorn(scores)
            runs.append((result.assignments.detach(), *torch.autograd.grad(result.assignments, scores, weight)))
        for run in runs[1:]:
            assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", [False, True])
def test_buffers_are_written_whole(monkeypatch, variant, init) -> None:
    """An engine may get uninitialised memory; here it is full of NaN."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        result = empty(*args, **kwargs)
        return result.fill_(torch.nan) if result.dtype.is_floating_point else result.fill_(0xFF)

    scores, weight = x(67, 35).requires_grad_(), x(67, 35, seed=1)
    start = x(35, seed=2) if init else None
    with running(variant):
        expected = fastcl.sinkhorn(scores, init=start)
        gradient = torch.autograd.grad(expected.assignments, scores, weight)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", filled)
            got = fastcl.sinkhorn(scores, init=start)
            again = torch.autograd.grad(got.assignments, scores, weight)
    assert torch.equal(got.assignments, expected.assignments)
    assert torch.equal(gradient[0], again[0])


@pytest.mark.parametrize("tol", [None, 1e-6])
def test_blocks_add_up(monkeypatch, tol) -> None:
    scores, weight = x(50, 11, dtype=torch.float64).requires_grad_(), x(50, 11, seed=1, dtype=torch.float64)
    results = []
    for size in (1 << 20, 7 * 11):
        monkeypatch.setattr(sinkhorn_chunked, "CPU_BLOCK", size)
        with fastcl.use_backend("chunked"):
            result = fastcl.sinkhorn(scores, epsilon=0.5, n_iters=200 if tol else 4, tol=tol, init=x(11))
        results.append((result.assignments, *torch.autograd.grad(result.assignments, scores, weight)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_autocast_changes_nothing(backend) -> None:
    scores = x(20, 9).requires_grad_()
    plain = fastcl.sinkhorn(scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fastcl.sinkhorn(scores)
        (gradient,) = torch.autograd.grad(result.assignments, scores, x(20, 9, seed=1))
    torch.testing.assert_close(result.assignments, plain.assignments, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.assignments, scores, x(20, 9, seed=1))[0])


def test_scores_of_minus_infinity_are_never_assigned(backend) -> None:
    scores = x(12, 6)
    scores[::2, 1] = -torch.inf
    leaf = scores.requires_grad_()
    result = fastcl.sinkhorn(leaf, epsilon=0.5, n_iters=5)
    assert (result.assignments[::2, 1] == 0).all()
    torch.testing.assert_close(result.assignments.sum(1), torch.ones(12))
    (gradient,) = torch.autograd.grad(result.assignments, leaf, x(12, 6, seed=1))
    assert gradient.isfinite().all()
    assert (gradient[::2, 1] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_shows(backend, bad) -> None:
    scores = x(12, 6)
    scores[3, 2] = bad
    assert fastcl.sinkhorn(scores).assignments.isnan().any()


def test_unused_outputs_and_inputs(backend) -> None:
    scores = x(12, 6)
    epsilon, prior = torch.tensor(0.5, requires_grad=True), torch.ones(6, requires_grad=True)
    result = fastcl.sinkhorn(scores, epsilon=epsilon, prior=prior)
    gradients = torch.autograd.grad(result.col_potential[0], (epsilon, prior))
    leaves = torch.tensor(0.5, requires_grad=True), torch.ones(6, requires_grad=True)
    plan = log_domain(scores, *leaves, torch.ones(12), 3)
    for one, other in zip(gradients, torch.autograd.grad(plan.col_potential[0], leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


S = torch.zeros(4, 3)


def hopeless(scores: Tensor, where: Any) -> Tensor:
    result = scores.clone()
    result[where] = -torch.inf
    return result


def test_a_column_of_minus_infinity_without_mass_is_no_error(backend) -> None:
    scores = hopeless(x(6, 4), (..., 1))
    result = fastcl.sinkhorn(scores, prior=torch.tensor([1.0, 0, 1, 2]))
    torch.testing.assert_close(result.assignments.sum(1), torch.ones(6))
    assert (result.assignments[:, 1] == 0).all()


def test_the_largest_epsilon(backend) -> None:
    result = fastcl.sinkhorn(x(6, 4), epsilon=1e36, prior=torch.tensor([1.0, 1e-30, 1, 1]))
    assert result.col_potential.isfinite().all()
    assert result.row_potential.isfinite().all()
    torch.testing.assert_close(result.assignments.sum(1), torch.ones(6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.sinkhorn([1.0]), TypeError, "scores: expected a tensor, got list"),
        (lambda: fastcl.sinkhorn(S.int()), TypeError, "scores: expected float64, float32, bfloat16 or float16"),
        (lambda: fastcl.sinkhorn(S[0]), ValueError, r"scores: expected shape \[N, K\] or \[B, N, K\], got \[3\]"),
        (lambda: fastcl.sinkhorn(S[:, :0]), ValueError, "scores: expected at least one column"),
        (lambda: fastcl.sinkhorn(S[:0]), ValueError, "scores: expected at least one row"),
        (lambda: fastcl.sinkhorn(S, epsilon=0), ValueError, "epsilon: expected a positive number"),
        (lambda: fastcl.sinkhorn(S, epsilon=2e36), ValueError, "epsilon: expected at most 1e\\+36, got 2e\\+36"),
        (lambda: fastcl.sinkhorn(S, epsilon=torch.tensor(2e36)), ValueError, "epsilon: expected at most 1e"),
        (lambda: fastcl.sinkhorn(hopeless(S, (..., 1))), ValueError, "scores: expected one .* column 1 has none"),
        (lambda: fastcl.sinkhorn(hopeless(S, (2,))), ValueError, "scores: expected one above -inf .* row 2 has none"),
        (lambda: fastcl.sinkhorn(hopeless(S, (2,)), n_iters=1), ValueError, "scores: expected one .* row 2 has none"),
        (
            lambda: fastcl.sinkhorn(hopeless(S, (slice(1, None), 2)), row_marginal=torch.tensor([0.0, 1, 1, 1])),
            ValueError,
            "scores: expected one .* column 2 has none",
        ),
        (lambda: fastcl.sinkhorn(S, epsilon="1"), TypeError, "epsilon: expected a number, got str"),
        (lambda: fastcl.sinkhorn(S, n_iters=0), ValueError, "n_iters: expected at least 1, got 0"),
        (lambda: fastcl.sinkhorn(S, n_iters=2.0), TypeError, "n_iters: expected an integer, got 2.0"),
        (lambda: fastcl.sinkhorn(S, tol=0), ValueError, "tol: expected a positive number"),
        (lambda: fastcl.sinkhorn(S, prior=torch.ones(4)), ValueError, r"prior: expected shape \[3\], got \[4\]"),
        (
            lambda: fastcl.sinkhorn(S[None], prior=torch.ones(2, 3)),
            ValueError,
            r"prior: expected shape \[3\] or \[1, 3\], got \[2, 3\]",
        ),
        (lambda: fastcl.sinkhorn(S, prior=torch.ones(3).int()), TypeError, "prior: expected float64, float32"),
        (lambda: fastcl.sinkhorn(S, prior=-torch.ones(3)), ValueError, "prior: expected non-negative finite numbers"),
        (lambda: fastcl.sinkhorn(S, prior=torch.full((3,), torch.nan)), ValueError, "prior: expected non-negative"),
        (lambda: fastcl.sinkhorn(S, prior=torch.zeros(3)), ValueError, "prior: expected a positive sum"),
        (lambda: fastcl.sinkhorn(S, row_marginal=torch.zeros(4)), ValueError, "row_marginal: expected a positive sum"),
        (lambda: fastcl.sinkhorn(S, init=torch.full((3,), torch.inf)), ValueError, "init: expected a column potential"),
        (lambda: fastcl.sinkhorn(S, init=torch.zeros(4)), ValueError, r"init: expected shape \[3\], got \[4\]"),
        (lambda: fastcl.sinkhorn(S, group="world"), TypeError, "group: expected a torch.distributed process group"),
        (lambda: fastcl.sinkhorn(S, prior=torch.ones(3, device="meta")), ValueError, "prior: expected a tensor on cpu"),
        (lambda: fastcl.uniform_prior(0), ValueError, "k: expected at least 1"),
        (lambda: fastcl.power_law_prior(3, -1.0), ValueError, "exponent: expected a number >= 0"),
        (lambda: fastcl.prior_from_counts(torch.tensor([0, 0])), ValueError, "counts: expected a positive sum"),
        (lambda: fastcl.prior_from_counts(torch.tensor([1, -1])), ValueError, "counts: expected non-negative"),
        (lambda: fastcl.prior_from_counts(torch.ones(2, 2)), ValueError, r"counts: expected shape \[K\]"),
        (lambda: fastcl.prior_from_counts(torch.ones(2).bool()), TypeError, "counts: expected integers or a floating"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
