"""The error rule accepts PyTorch and rejects planted errors: crude ones, and those of kernels that round too early."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.support.oracle import CANCELLING, TRUTH, Evaluation, cluster_infonce, differentiate, eager_evaluations
from tests.support.strategies import generator, rows
from tests.support.tolerances import check, half_ulp

TEMPERATURE = 0.05


class Problem:
    """SimCLR on 128 samples in two views: loss and gradient from the formula, and what the rule needs to judge others.

    Converged rows are few enough dimensions apart that float16 holds the gradient, unless d says otherwise.
    """

    def __init__(self, kind: str, dtype: torch.dtype, seed: int = 0, d: int | None = None) -> None:
        groups = torch.arange(128).repeat_interleave(2)
        self.x = rows(kind, groups, d or (64 if kind == "random" else 16), generator(seed), unit=False).to(dtype)
        arguments = {"embeddings": self.x, "clusters": groups, "temperature": TEMPERATURE}

        def evaluate(how: Evaluation) -> tuple[Tensor, Tensor]:
            loss, gradients = differentiate(
                cluster_infonce, arguments, ["embeddings"], lambda loss: loss, how.dtype, how=how
            )
            return loss.detach(), gradients["embeddings"]

        self.evaluate = evaluate
        self.accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        self.truth = evaluate(TRUTH)
        self.draws = [evaluate(how) for how in eager_evaluations(self.accumulation)]
        self.parts = [evaluate(how) for how in CANCELLING]

    def check_loss(self, loss: Tensor) -> None:
        magnitude = sum(part.abs() for part, _ in self.parts)
        eager = [value for value, _ in self.draws]
        check("loss", loss, self.truth[0], eager, accumulation=self.accumulation, magnitude=magnitude)

    def check_gradient(self, gradient: Tensor) -> None:
        check(
            "gradient",
            gradient,
            self.truth[1],
            [g for _, g in self.draws],
            accumulation=self.accumulation,
            half_rows=self.x.dtype,
            magnitude=sum(part.abs() for _, part in self.parts),
        )

    def is_refused(self, gradient: Tensor) -> None:
        with pytest.raises(AssertionError, match=r"gradient: error .* allowed"):
            self.check_gradient(gradient)


class Kernel:
    """The float32 gradient in the steps of a kernel, each of which a test can do wrongly. dL/dx, before any cast."""

    def __init__(self, problem: Problem) -> None:
        x = problem.x.float()
        n = len(x)
        self.inverse = 1 / x.norm(dim=1, keepdim=True)
        self.unit = x * self.inverse
        self.partner = torch.arange(n) ^ 1
        s = self.unit @ self.unit.T / TEMPERATURE
        masked = s.clone().fill_diagonal_(-torch.inf)
        self.softmax = masked.softmax(1)
        self.positive = torch.zeros(n, n)
        self.positive[torch.arange(n), self.partner] = 1
        # The softmax less the positive, of which nothing cancels: what the negatives have is what the positive lacks.
        negatives = self.softmax * (1 - self.positive)
        self.difference = negatives - self.positive * negatives.sum(1, keepdim=True)
        self.scale = 1 / (n * TEMPERATURE)

    def through(self, g: Tensor) -> Tensor:
        """From dL/ds, [N, N], to the gradient of the unit rows."""
        return (g @ self.unit + g.T @ self.unit) * self.scale

    def project(self, gradient: Tensor) -> Tensor:
        return self.inverse * (gradient - self.unit * (self.unit * gradient).sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_pytorch_itself_is_accepted(kind, dtype, seed) -> None:
    """Also with orders of summation that the rule has not seen."""
    problem = Problem(kind, dtype, seed)
    for order in range(10, 14):
        loss, gradient = problem.evaluate(Evaluation(problem.accumulation, order, scale_first=order % 2 == 0))
        problem.check_loss(loss)
        problem.check_gradient(gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_careful_kernel_is_accepted(dtype) -> None:
    """The planted errors below start from this kernel."""
    problem = Problem("converged", dtype)
    kernel = Kernel(problem)
    problem.check_gradient(kernel.project(kernel.through(kernel.difference)).to(dtype))


def test_one_less_the_share_of_a_single_positive_is_refused() -> None:
    """What is left of its gradient has then the digits of the 1."""
    problem = Problem("converged", torch.float32, d=64)
    kernel = Kernel(problem)
    problem.check_gradient(kernel.project(kernel.through(kernel.difference)))
    problem.is_refused(kernel.project(kernel.through(kernel.softmax - kernel.positive)))


def test_positive_part_added_from_sums_is_refused() -> None:
    """The positive term outside the tile, in float32 or rounded further."""
    problem = Problem("converged", torch.float32, d=64)
    kernel = Kernel(problem)
    softmax_part = kernel.through(kernel.softmax)
    cluster_sums = kernel.unit + kernel.unit[kernel.partner]
    positive_part = 2 * (cluster_sums - kernel.unit) * kernel.scale
    problem.is_refused(kernel.project(softmax_part - positive_part))
    rounded = softmax_part.bfloat16().float() - positive_part.bfloat16().float()
    problem.is_refused(kernel.project(rounded))


def test_positive_part_rounded_to_bfloat16_is_refused() -> None:
    problem = Problem("converged", torch.bfloat16)
    kernel = Kernel(problem)
    softmax_part = kernel.softmax.bfloat16().float()
    problem.is_refused(kernel.project(kernel.through(softmax_part - kernel.positive)).bfloat16())


def test_gradient_cast_before_the_projection_is_refused() -> None:
    problem = Problem("random", torch.bfloat16)
    kernel = Kernel(problem)
    # Most of this gradient lies along the rows: every row's own part would have to be projected out in float32.
    along = kernel.through(kernel.difference) + 20 * kernel.unit * kernel.scale
    problem.check_gradient(kernel.project(along).bfloat16())
    problem.is_refused(kernel.project(along.bfloat16().float()).bfloat16())


def test_half_precision_logits_are_refused() -> None:
    problem = Problem("converged", torch.bfloat16)
    unit = problem.x.float() / problem.x.float().norm(dim=1, keepdim=True)
    x = unit.bfloat16().double().requires_grad_()
    clusters = torch.arange(128).repeat_interleave(2)
    loss = cluster_infonce(x, clusters, temperature=TEMPERATURE, normalize=False)
    with pytest.raises(AssertionError, match=r"loss: error .* allowed"):
        problem.check_loss(loss.float())


@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-9), (torch.float32, 2e-3), (torch.float16, 4 * 2**-11), (torch.bfloat16, 4 * 2**-8)],
)
def test_a_wrong_factor_is_refused(kind, dtype, error) -> None:
    problem = Problem(kind, dtype)
    loss, gradient = problem.truth
    problem.check_gradient(gradient.to(dtype))
    problem.is_refused((gradient * (1 + error)).to(dtype))
    if dtype.itemsize > 2:
        problem.check_loss(loss.to(dtype))
        with pytest.raises(AssertionError, match=r"loss: error .* allowed"):
            problem.check_loss((loss * (1 + error)).to(dtype))


def test_rows_left_out_or_exchanged_are_refused() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        problem = Problem("random", dtype)
        gradient = problem.truth[1].to(dtype, copy=True)
        gradient[100] = 0
        problem.is_refused(gradient)
        gradient = problem.truth[1].to(dtype, copy=True)
        gradient[[3, 4]] = gradient[[4, 3]]
        problem.is_refused(gradient)


def test_float32_sums_are_refused_in_float64() -> None:
    problem = Problem("random", torch.float64)
    loss, gradient = problem.evaluate(Evaluation(torch.float32))
    problem.is_refused(gradient.double())
    with pytest.raises(AssertionError, match="loss: error"):
        problem.check_loss(loss.double())


def test_an_error_of_the_floor_is_accepted_and_of_twice_the_floor_refused() -> None:
    truth = normalize(torch.randn(100, generator=generator(0), dtype=torch.float64), dim=0)
    off = normalize(torch.randn(100, generator=generator(1), dtype=torch.float64), dim=0)
    perfect = [truth]
    check("x", truth + 0.99e-5 * off, truth, perfect)
    with pytest.raises(AssertionError, match="x: error"):
        check("x", truth + 2e-5 * off, truth, perfect)
    # Eager's own error raises the bound 1.5 times, and the largest draw counts.
    draws = [truth + 1e-4 * off, truth + 1e-3 * off]
    check("x", truth + 1.49e-3 * off, truth, draws)
    with pytest.raises(AssertionError, match="x: error"):
        check("x", truth + 1.6e-3 * off, truth, draws)


def test_noise_where_the_truth_is_zero() -> None:
    truth = torch.zeros(3, dtype=torch.float64)
    check("x", torch.zeros(3), truth, [truth])
    with pytest.raises(AssertionError, match="x: error"):
        check("x", torch.full((3,), 1e-9), truth, [truth])
    check("x", torch.full((3,), 1e-9), truth, [truth], magnitude=torch.ones(3))
    with pytest.raises(AssertionError, match="x: error"):
        check("x", torch.full((3,), 1e-6), truth, [truth], magnitude=torch.ones(3))


def test_infinities_and_nan() -> None:
    truth = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    check("x", truth.float(), truth, [truth.float()])
    for wrong in ([0.0, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf], [-1e38, 1.0]):
        with pytest.raises(AssertionError, match="x: infinities"):
            check("x", torch.tensor(wrong), truth, [truth.float()])
    for wrong in ([torch.nan, 1.0], [-torch.inf, torch.nan]):
        with pytest.raises(AssertionError, match="x: NaN"):
            check("x", torch.tensor(wrong), truth, [truth.float()])


def test_a_wrong_shape_is_refused() -> None:
    truth = torch.zeros(3, dtype=torch.float64)
    for wrong in (torch.zeros(1), torch.zeros(3, 1), torch.zeros(())):
        with pytest.raises(AssertionError, match="x: shape"):
            check("x", wrong, truth, [truth])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_ulp_bounds_the_rounding(dtype) -> None:
    g = generator(0)
    values = torch.randn(10000, generator=g, dtype=torch.float64) * 10.0 ** torch.randint(-7, 4, (10000,), generator=g)
    error = (values.to(dtype).double() - values).abs()
    assert (error <= half_ulp(values, dtype)).all()
    if dtype != torch.float64:
        assert (error > half_ulp(values, dtype) / 4).any()
