"""Prototype losses at their edges: infinite scores, features under the error rule, repeated runs, memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import fastcl
from fastcl import functional, prototype_cross_entropy
from tests.support.backends import QUICK, VARIANTS, running
from tests.support.strategies import generator
from tests.support.tolerances import check

N, K, D = 19, 67, 12
INFINITE = -torch.inf


def rows(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator(seed)), dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_minus_infinity(variant: str, dtype: torch.dtype) -> None:
    """The student's adds nothing where the teacher has no mass, and makes the loss infinite where it has some."""
    student, teacher = (rows(5, K, seed).to(dtype) for seed in (0, 1))
    student[0, 3] = teacher[0, 3] = INFINITE
    student[1, 5] = INFINITE
    teacher[2, K - 1] = INFINITE
    student[3], teacher[4] = INFINITE, INFINITE
    own = student.clone().requires_grad_()
    with running(variant):
        found = prototype_cross_entropy(own, teacher, reduction="none")
        (gradient,) = torch.autograd.grad(found[:3].sum(), own)
    goals, guesses = (teacher.double() / 0.04).softmax(1), (student.double() / 0.1).softmax(1)
    expected = -torch.where(goals == 0, 0, goals * guesses.log()).sum(1)
    torch.testing.assert_close(found[:3].double(), expected[:3], rtol=1e-5, atol=0)
    assert found[1] == torch.inf
    assert not found[3:].isfinite().any()
    half = dtype in (torch.bfloat16, torch.float16)
    truth = ((guesses - goals) / 0.1)[:3]
    torch.testing.assert_close(gradient[:3].double(), truth, rtol=8e-3 if half else 1e-4, atol=1e-5)
    assert gradient[0, 3] == 0


@pytest.mark.parametrize("converged", [False, True])
@pytest.mark.parametrize("temperature", [0.04, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_keep_the_error_rule(dtype: torch.dtype, temperature: float, converged: bool) -> None:
    target = rows(N, D, 1)
    source = F.normalize(target + 0.05 * rows(N, D, 2), dim=1) if converged else rows(N, D, 2)
    given = [x.to(dtype) for x in (source, rows(K, D, 0), target, rows(K, D, 0))]
    potential = 0.1 * torch.randn(K, generator=generator(3))

    def by(accumulation: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x, w, y, v = (one.to(accumulation) for one in given)
        x, w = x.requires_grad_(), w.clone().requires_grad_()
        goals = ((y @ v.T + potential.to(accumulation)) / temperature).softmax(1)
        loss = -(goals * (x @ w.T / 0.1).log_softmax(1)).sum(1).mean()
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    truth, eager = by(torch.float64), by(wide)
    x, w, y, v = given
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prototype_cross_entropy((x, w), (y, v), teacher_temperature=temperature, potential=potential)
    gradients = torch.autograd.grad(loss, (x, w))
    assert (loss.dtype, *(g.dtype for g in gradients)) == (wide, dtype, dtype)
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    check("loss", loss, truth[0], [eager[0]], accumulation=wide)
    for name, one, right, plain in zip(("features", "prototypes"), gradients, truth[1:], eager[1:], strict=True):
        check(name, one, right, [plain], accumulation=wide, half_rows=half)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("backend", QUICK)
def test_runs_repeat_to_the_bit(backend: str, features: bool) -> None:
    x, w, y = (rows(n, D, seed).float() for n, seed in ((300, 0), (K, 1), (300, 2)))

    def run() -> list[Tensor]:
        own = (x.clone().requires_grad_(), w.clone().requires_grad_())
        student, teacher = (own, (y, w)) if features else (own[0] @ own[1].T, y @ w.T)
        potential = fastcl.sinkhorn_potentials(y, w, epsilon=0.04).col_potential
        loss = prototype_cross_entropy(student, teacher, potential=potential)
        return [loss.detach(), *torch.autograd.grad(loss, own)]

    with running(backend):
        assert all(map(torch.equal, run(), run()))


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that the second of two calls holds at most, its results included."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    changes = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


ROWS, WIDE = 1536, 2048  # scores of 12 MB
SCORES = 4 * ROWS * WIDE


@pytest.mark.parametrize("loss", ["cross-entropy", "DINO", "SwAV with a queue", "CAPI, chosen patches"])
@pytest.mark.skipif("cpu" not in QUICK, reason="the native module is missing")
def test_the_gradient_is_the_only_matrix(loss: str) -> None:
    """Of forward and backward together; less than half a matrix beside the students' gradients."""
    crops = [torch.randn(ROWS, WIDE, generator=generator(seed)).requires_grad_() for seed in range(2)]
    teacher = [x.detach() * 0.3 for x in crops]
    queue, few = torch.randn(ROWS // 2, WIDE).double(), 4
    index = torch.arange(2).expand(ROWS // few, 2)
    criteria: dict[str, tuple[Callable[[], Tensor], int]] = {
        "cross-entropy": (lambda: prototype_cross_entropy(crops[0], teacher[0]), 2),
        "DINO": (lambda: fastcl.DINOLoss(WIDE, centering="sinkhorn")(crops, teacher), 4),
        "SwAV with a queue": (lambda: fastcl.SwAVLoss()(crops, queue_scores=[queue, queue]), 4),
        "CAPI, chosen patches": (
            lambda: fastcl.CapiLoss(WIDE)(
                crops[0][: ROWS // 2].view(-1, 2, WIDE), teacher[0].view(-1, few, WIDE), index
            ),
            3,
        ),
    }
    call, halves = criteria[loss]

    def step() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(call(), crops, allow_unused=True)

    with running("cpu"):
        peak = peak_memory(step)
    assert peak < halves * SCORES / 2 + 0.4 * SCORES


def test_stateless_forms_are_the_modules() -> None:
    crops, teacher = [rows(N, K, seed) for seed in (0, 1, 2)], [rows(N, K, seed) for seed in (3, 4)]
    mask = torch.arange(2 * N).view(2, N) % 2 == 0
    center, prior = 0.1 * torch.randn(K, generator=generator(5)), fastcl.power_law_prior(K)
    centred, balanced = fastcl.DINOLoss(K), fastcl.DINOLoss(K, centering="sinkhorn", prior=prior)
    centred.center = center.clone()
    masked, capi = fastcl.IBOTLoss(K, centering="sinkhorn"), fastcl.CapiLoss(K, n_iters=2)
    patches = crops[0].view(1, N, K), teacher[0].view(1, N, K)
    for one, other in (
        (functional.dino_loss(crops, teacher, center=center), centred(crops, teacher)),
        (functional.dino_loss(crops, teacher, prior=prior), balanced(crops, teacher)),
        (functional.ibot_loss(crops[0], teacher[0], mask), masked(crops[0], teacher[0], mask)),
        (functional.capi_loss(*patches, n_iters=2), capi(*patches)),
    ):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"center: expected shape \[67\], got \[3\]"):
        functional.dino_loss(crops, teacher, center=center[:3])
    with pytest.raises(TypeError, match="teacher: expected a list"):
        functional.dino_loss(crops, None)
