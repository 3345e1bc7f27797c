"""SigmoidLoss and SigLipLoss against the plain formula."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fastcl
from fastcl.functional import sigmoid_loss
from tests.support.backends import INTERPRETED, QUICK, needs_interpreter, running
from tests.support.judging import judge, objective
from tests.support.oracle import differentiate
from tests.support.oracle import sigmoid_loss as formula
from tests.support.strategies import DTYPES, LossProblem, generator, loss_problem, loss_problems

OTHER_OPTIONS = ("form", "denominator", "margin", "label_smoothing", "symmetric")


def check_loss(problem: LossProblem, backends: tuple[str, ...], bias: float = -3.0, learned: bool = True) -> None:
    """Value and gradients of every backend against the float64 formula, by the error rule."""
    arguments = {name: value for name, value in problem.arguments().items() if name not in OTHER_OPTIONS}
    wide = torch.float64 in (problem.dtype, problem.contrast_dtype)
    arguments["bias"] = torch.tensor(bias, dtype=torch.float64 if wide else torch.float32) if learned else bias
    leaves = (*problem.leaves, "bias") if learned else problem.leaves
    found = {}
    for backend in backends:
        with running(backend):
            found[backend] = differentiate(sigmoid_loss, arguments, leaves, objective)
    judge(arguments, leaves, found, formula)


@settings(max_examples=80)
@given(loss_problems())
def test_matches_the_formula(problem: LossProblem) -> None:
    check_loss(problem, QUICK)


@needs_interpreter
@settings(max_examples=10)
@given(loss_problems(interpreted=True))
def test_triton_matches_the_formula(problem: LossProblem) -> None:
    check_loss(problem, INTERPRETED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(reduction, dtype) -> None:
    kinds: dict[str, Any] = {"reduction": reduction, "dtype": dtype, "contrast_dtype": dtype, "pattern": "negatives"}
    check_loss(loss_problem(**kinds, weights=True, bias=True), QUICK)
    check_loss(loss_problem(**kinds, contrasts="paired", m=23, ids=True, positives=True), QUICK, learned=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contrasts", [None, "paired"])
@pytest.mark.parametrize("bias", [-10.0, 0.0])
def test_converged_rows(dtype, contrasts, bias) -> None:
    kinds: dict[str, Any] = {"kind": "converged", "temperature": 0.05, "pattern": None, "d": 64, "n": 63}
    check_loss(loss_problem(contrasts=contrasts, dtype=dtype, contrast_dtype=dtype, **kinds), QUICK, bias)


def rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    unit = nn.functional.normalize(torch.randn(n, d, generator=generator(seed), dtype=torch.float64))
    return unit.to(dtype).requires_grad_()


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def plain_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's, as it stands there."""
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -nn.functional.logsigmoid(labels * logits).sum() / len(image)


def test_siglip(backend) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    leaves = rows(21, 8, 0, dtype), rows(21, 8, 1, dtype), number(9.0), number(-8.0)
    truth = plain_siglip(*(leaf.double() for leaf in leaves))
    expected = torch.autograd.grad(truth, leaves)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if backend == "triton" else {"rtol": 1e-10, "atol": 1e-12}
    for call in (fastcl.SigLipLoss(), lambda *a: fastcl.SigLipLoss()(*a, output_dict=True)["contrastive_loss"]):
        loss = call(*leaves)
        torch.testing.assert_close(loss.double(), truth, **tolerance)
        for got, right in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(got, right, **tolerance)


def test_siglip_without_bias_and_without_rows() -> None:
    image, text = rows(5, 3, 0), rows(5, 3, 1)
    expected = plain_siglip(image, text, number(2.0), number(0.0))
    torch.testing.assert_close(fastcl.SigLipLoss()(image, text, 2.0), expected)
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = fastcl.SigLipLoss()(empty, empty.detach(), 2.0, -1.0)
    loss.backward()
    assert loss.item() == 0


def test_a_learned_temperature_and_bias_have_exact_gradients() -> None:
    loss = fastcl.SigmoidLoss(nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(-4.0))).double()
    x = rows(12, 6, 3)
    clusters = torch.arange(12) % 4
    assert [name for name, _ in loss.named_parameters()] == ["temperature", "bias"]
    arguments = {"temperature": loss.temperature, "bias": loss.bias}
    found = torch.autograd.grad(loss(x, clusters), [x, *arguments.values()])
    right = torch.autograd.grad(formula(x, clusters, **arguments), [x, *arguments.values()])
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        loss(x, clusters, temperature=0.5, bias=1.0), formula(x, clusters, temperature=0.5, bias=1.0)
    )


def test_queue_and_extra_positives(backend) -> None:
    queue = fastcl.MemoryQueue(16, 6)
    queue.enqueue(rows(11, 6, 4, torch.float32).detach())
    x, key = rows(7, 6, 5, torch.float32), rows(7, 6, 6, torch.float32)
    found = fastcl.SigmoidLoss(0.2, -2.0)(x, positives=key, contrasts=queue)
    unit_x, unit_key = nn.functional.normalize(x), nn.functional.normalize(key)
    s, own = 5 * unit_x @ queue.embeddings.T - 2, 5 * (unit_x * unit_key).sum(1) - 2
    expected = (torch.logaddexp(s, torch.zeros(())).sum(1) + torch.logaddexp(-own, torch.zeros(()))).mean()
    torch.testing.assert_close(found, expected)
    for got, right in zip(torch.autograd.grad(found, [x, key]), torch.autograd.grad(expected, [x, key]), strict=True):
        torch.testing.assert_close(got, right)


def test_statistics_and_weights_that_are_0() -> None:
    x, clusters = rows(12, 6, 3), torch.arange(12) % 4
    loss = fastcl.SigmoidLoss(0.2, -4.0)
    found, stats = loss(x, clusters, return_stats=True)
    assert torch.equal(found, loss(x, clusters))
    _, expected = fastcl.ClusterInfoNCE(0.2)(x, clusters, return_stats=True)
    for got, right in zip(stats[:4], expected[:4], strict=True):
        torch.testing.assert_close(got, right)
    found = loss(x, clusters, weights=torch.zeros(12))
    found.backward()
    assert found.item() == 0
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_compiles_whole() -> None:
    x, y, scale, bias = rows(9, 4, 0), rows(9, 4, 1), number(3.0), number(-2.0)
    compiled = torch.compile(fastcl.SigLipLoss(), fullgraph=True, dynamic=True, backend="aot_eager")
    for leaves in ((x, y, scale, bias), (rows(6, 4, 2), rows(6, 4, 3), scale, bias)):
        expected = plain_siglip(*leaves)
        loss = compiled(*leaves)
        torch.testing.assert_close(loss, expected)
        for got, right in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(got, right)
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_raise(reduction) -> None:
    x = rows(6, 4, 0)
    loss = sigmoid_loss(x, torch.arange(6) % 2, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(first.sum(), x)


def test_autocast_leaves_the_loss_alone() -> None:
    x, y = rows(9, 4, 0, torch.float32), rows(9, 4, 1, torch.float32)
    plain = fastcl.SigLipLoss()(x, y, 3.0, -2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastcl.SigLipLoss()(x, y, 3.0, -2.0)
    assert torch.equal(found, plain)


def test_modules_survive_copies() -> None:
    loss = fastcl.SigmoidLoss(nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(-4.0)), reduction="sum")
    assert repr(loss) == ("SigmoidLoss(temperature=0.2 (learned), bias=-4 (learned), normalize=True, reduction='sum')")
    x = rows(5, 3, 0, torch.float32)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(x, torch.zeros(5).long()), loss(x, torch.zeros(5).long()))
    fresh = fastcl.SigmoidLoss(nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0)))
    fresh.load_state_dict(loss.state_dict())
    assert fresh.bias.item() == -4
    assert repr(fastcl.SigLipLoss(gather="ring")) == "SigLipLoss(gather='ring')"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"bias": float("nan")}, ValueError, "bias: expected a finite number"),
        ({"bias": torch.zeros(3)}, ValueError, "bias: expected a finite number or a floating tensor of one element"),
        ({"bias": torch.tensor(torch.inf)}, ValueError, "bias: expected a finite number"),
        ({"bias": "low"}, TypeError, "bias: expected a number"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of"),
        ({"clusters": None}, ValueError, "clusters: expected"),
        ({"weights": torch.ones(3)}, ValueError, "weights: expected"),
        ({"return_stats": 1}, TypeError, "return_stats: expected"),
    ],
)
def test_bad_input(arguments, kind, message) -> None:
    given: dict[str, Any] = {"embeddings": rows(6, 4, 0), "clusters": torch.arange(6) % 2}
    with pytest.raises(kind, match=message):
        sigmoid_loss(**given | arguments)


def test_bad_input_of_siglip() -> None:
    image, text = rows(6, 4, 0), rows(5, 4, 1)
    with pytest.raises(ValueError, match=r"text_features: expected 6 rows, as in image_features, got 5"):
        fastcl.SigLipLoss()(image, text, 2.0, 0.0)
    with pytest.raises(ValueError, match="logit_bias: expected a finite number or a floating tensor of one element"):
        fastcl.SigLipLoss()(image, image, 2.0, torch.zeros(2))
    with pytest.raises(ValueError, match="logit_scale: expected a positive number"):
        fastcl.SigLipLoss()(image, image, 0.0, 0.0)
