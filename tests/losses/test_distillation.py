"""`prototype_cross_entropy`, DINO, iBOT and CAPI against plain formulas in float64, and against lightly."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from fastcl import functional, prototype_cross_entropy
from tests.support.backends import QUICK, running
from tests.support.sinkhorn_oracle import swav_loop
from tests.support.strategies import generator
from tests.support.tolerances import check

N, K, D = 21, 65, 12


def rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator(seed)), dim=1).to(dtype)


def plain(student: Tensor, teacher: Tensor, potential: Tensor, temperature: float) -> Tensor:
    goals = ((teacher + potential) / temperature).softmax(1)
    return -(goals * (student / 0.1).log_softmax(1)).sum(1)


@pytest.mark.parametrize("converged", [False, True])
@pytest.mark.parametrize("temperature", [0.04, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule(dtype: torch.dtype, temperature: float, converged: bool) -> None:
    prototypes = rows(K, D, 0)
    target = rows(N, D, 1)
    source = F.normalize(target + 0.05 * rows(N, D, 2), dim=1) if converged else rows(N, D, 2)
    teacher, student = ((x @ prototypes.T).to(dtype) for x in (target, source))
    potential = 0.1 * torch.randn(K, generator=generator(3))

    def by(accumulation: torch.dtype) -> tuple[Tensor, Tensor]:
        own = student.to(accumulation).requires_grad_()
        loss = plain(own, teacher.to(accumulation), potential.to(accumulation), temperature).mean()
        return loss.detach(), torch.autograd.grad(loss, own)[0]

    truth, eager = by(torch.float64), by(torch.float32)
    own = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prototype_cross_entropy(own, teacher, teacher_temperature=temperature, potential=potential)
    (gradient,) = torch.autograd.grad(loss, own)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    check("loss", loss, truth[0], [eager[0]])
    check("gradient", gradient, truth[1], [eager[1]], half_rows=None if dtype == torch.float32 else dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", QUICK)
def test_features_give_what_their_scores_give(backend: str, reduction: str) -> None:
    student = [rows(N, D, seed).requires_grad_() for seed in range(3)]
    prototypes, goals = rows(K, D, 5).requires_grad_(), rows(K, 7, 6)
    teacher, weights = [rows(N, 7, seed) for seed in (7, 8)], torch.arange(N).double()
    options = {"potential": 0.1 * torch.randn(3, K, generator=generator(9)), "weights": weights, "reduction": reduction}
    with running(backend):
        one = prototype_cross_entropy([(x, prototypes) for x in student], [(y, goals) for y in teacher], **options)
        other = prototype_cross_entropy([x @ prototypes.T for x in student], [y @ goals.T for y in teacher], **options)
    torch.testing.assert_close(one, other)
    factor = torch.linspace(1, 2, N).double() if reduction == "none" else torch.tensor(2.0).double()
    for x, y in zip(
        torch.autograd.grad((one * factor).sum(), [*student, prototypes]),
        torch.autograd.grad((other * factor).sum(), [*student, prototypes]),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("features", [False, True])
def test_compiles_and_refuses_second_derivatives(features: bool) -> None:
    def call(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return prototype_cross_entropy((x, w), (y, w)) if features else prototype_cross_entropy(x @ w.T, y @ w.T)

    x, w, y = rows(N, D, 0).float().requires_grad_(), rows(K, D, 1).float(), rows(N, D, 2).float()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    one, other = (torch.autograd.grad(function(x, w, y), x)[0] for function in (compiled, call))
    torch.testing.assert_close(one, other)
    (gradient,) = torch.autograd.grad(call(x, w, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("tol", [None, 1e-6])
def test_potentials_of_features_are_those_of_scores(tol: float | None, batched: bool) -> None:
    features, prototypes = rows(N, D, 0), rows(K, D, 1)
    if batched:
        features = torch.stack((features, rows(N, D, 2)))
    prior, init = torch.rand(K, generator=generator(3)), 0.1 * torch.rand(K, generator=generator(4))
    prior[2] = 0
    options = {"epsilon": 0.05, "prior": prior, "init": init, "n_iters": 300 if tol else 3, "tol": tol}
    one = fastcl.sinkhorn_potentials(features, prototypes, **options)
    other = fastcl.sinkhorn(features @ prototypes.T, **options)
    assert one.assignments is None
    torch.testing.assert_close(one.col_potential, other.col_potential)
    torch.testing.assert_close(one.row_potential, other.row_potential)
    assert int(one.n_iters) == int(other.n_iters)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_dino_is_the_papers(centering: str, features: bool) -> None:
    prototypes = rows(K, D, 0)
    student, teacher = ([rows(N, D, seed) for seed in seeds] for seeds in ((1, 2, 3), (4, 5)))
    loss = fastcl.DINOLoss(K, centering=centering).double()
    center = torch.zeros(K).double()
    for _ in range(2):
        own, other = (
            [(x, prototypes) if features else x @ prototypes.T for x in crops] for crops in (student, teacher)
        )
        got = loss(own, other)
        scores = [x @ prototypes.T for x in teacher]
        if centering == "sinkhorn":
            goals = swav_loop(torch.cat(scores), 0.04, 3).chunk(2)
        else:
            goals = [((t - center) / 0.04).softmax(1) for t in scores]
            center = 0.9 * center + 0.1 * torch.cat(scores).mean(0)
        terms = [
            -(goal * (x @ prototypes.T / 0.1).log_softmax(1)).sum(1).mean()
            for h, goal in enumerate(goals)
            for c, x in enumerate(student)
            if c != h
        ]
        torch.testing.assert_close(got.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    if centering == "mean":
        torch.testing.assert_close(loss.center.double(), center, rtol=1e-5, atol=1e-7)
        kept = loss.center.clone()
        loss.eval()(own, other)
        assert torch.equal(loss.center, kept)


def test_scores_that_are_not_finite_do_not_stay_in_the_centre() -> None:
    """A prototype masked with -inf is as if it were not there; an overflow costs its step only."""
    student, teacher = ([rows(N, K, seed).float() for seed in seeds] for seeds in ((1, 2), (3, 4)))
    masked, less = fastcl.DINOLoss(K), fastcl.DINOLoss(K - 1)
    for _ in range(2):
        got = masked(*([crop.index_fill(1, torch.tensor([2]), -torch.inf) for crop in c] for c in (student, teacher)))
        others = [column for column in range(K) if column != 2]
        torch.testing.assert_close(got, less(*([crop[:, others] for crop in c] for c in (student, teacher))))
    assert masked.center[2] == 0
    kept = masked.center.clone()
    assert masked(student, [torch.full_like(crop, torch.inf) for crop in teacher]).isnan()
    assert torch.equal(masked.center, kept)


def test_ibot_is_the_papers() -> None:
    mask = torch.rand(5, 3, 4, generator=generator(0)) < 0.4
    mask[2] = False
    count = int(mask.sum())
    student, teacher = rows(count, K, 1), rows(count, K, 2)
    got = fastcl.IBOTLoss(K, centering="sinkhorn")(student, teacher, mask)
    goals, total, place = swav_loop(teacher, 0.04, 3), 0.0, 0
    for image in mask:
        m = int(image.sum())
        terms = -(goals[place : place + m] * (student[place : place + m] / 0.1).log_softmax(1)).sum(1)
        total, place = total + (float(terms.mean()) if m else 0.0), place + m
    assert float(got) == pytest.approx(total / 5, rel=1e-6)


@pytest.mark.parametrize("indexed", [False, True])
def test_capi_is_the_papers(indexed: bool) -> None:
    teacher = rows(6 * 4, K, 1).view(6, 4, K)
    index = torch.tensor([[1, 3]]).expand(6, 2) if indexed else None
    student = rows(6 * (2 if indexed else 4), K, 2).view(6, -1, K).requires_grad_()
    got = fastcl.CapiLoss(K)(student, teacher, index)
    goals = torch.stack([swav_loop(teacher[:, p], 0.06, 3) for p in range(4)], 1)
    goals = goals[:, [1, 3]] if indexed else goals
    expected = -(goals * (student / 0.12).log_softmax(2)).sum(2).mean()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    one, other = (torch.autograd.grad(loss, student)[0] for loss in (got, expected))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_lightly_agrees() -> None:
    peers = pytest.importorskip("lightly.loss")
    capi = pytest.importorskip("lightly.loss.capi_loss")
    student, teacher = ([rows(N, K, seed) for seed in seeds] for seeds in ((1, 2, 3), (4, 5)))
    peer, own = peers.DINOLoss(K).double(), fastcl.DINOLoss(K)
    for _ in range(2):
        torch.testing.assert_close(own(student, teacher), peer(teacher, student), rtol=1e-5, atol=1e-6)
    mask = torch.zeros(3, 1, 2 * N, dtype=torch.bool)
    mask[0, :, :5], mask[1, :, : N - 5] = True, True
    torch.testing.assert_close(
        fastcl.IBOTLoss(K)(student[0], teacher[0], mask),
        peers.IBOTPatchLoss(K).double()(teacher[0], student[0], mask),
        rtol=1e-5,
        atol=1e-6,
    )
    s, t = rows(24, K, 1).view(6, 4, K), rows(24, K, 2).view(6, 4, K)
    torch.testing.assert_close(fastcl.CapiLoss(K)(s, t), capi.CAPILoss().double()(t, s), rtol=1e-5, atol=0)


def test_msn_options() -> None:
    anchors, targets, prototypes = rows(10, D, 0), rows(5, D, 1), rows(9, D, 2)
    base = fastcl.MSNLoss()(anchors, targets, prototypes)
    p = (anchors @ prototypes.T / 0.1).softmax(1)
    with_entropy = fastcl.MSNLoss(entropy_weight=0.5)(anchors, targets, prototypes)
    torch.testing.assert_close(with_entropy - base, -0.5 * (p * p.log()).sum(1).mean())
    mixed = fastcl.PMSNLoss(sinkhorn_prior=fastcl.uniform_prior)(anchors, targets, prototypes)
    prior = fastcl.power_law_prior(9).double()
    uniform = fastcl.MSNLoss(prior_weight=0.0)(anchors, targets, prototypes)
    mean = p.mean(0)
    torch.testing.assert_close(mixed, uniform + (mean * (mean / (prior / prior.sum())).log()).sum(), rtol=1e-6, atol=0)
    for part in ("temperature=0.1", "power_law_prior"):
        assert part in repr(fastcl.PMSNLoss())


@pytest.mark.parametrize("loss", [fastcl.DINOLoss(8), fastcl.IBOTLoss(8, centering="sinkhorn"), fastcl.CapiLoss(8)])
def test_state(loss: torch.nn.Module) -> None:
    again = copy.deepcopy(loss)
    again.load_state_dict(pickle.loads(pickle.dumps(loss)).half().state_dict())
    assert repr(again) == repr(loss)
    assert "teacher_temperature" in repr(loss)


def test_ibot_compiles_in_one_graph() -> None:
    loss = fastcl.IBOTLoss(6, centering="sinkhorn")
    student, teacher = torch.randn(4, 6, generator=generator(0)), torch.randn(4, 6, generator=generator(1))
    mask = torch.tensor([[True, True, False], [True, True, False]])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, mask), loss(student, teacher, mask))


def test_no_rows_and_not_a_number() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    for loss in (
        prototype_cross_entropy(empty, empty),
        prototype_cross_entropy((empty, torch.ones(3, 5)), (empty, torch.ones(3, 5))),
        fastcl.DINOLoss(5, centering="sinkhorn")([empty, empty], [empty]),
    ):
        assert float(loss.detach()) == 0
    predicted = torch.zeros(3, 0, 5, requires_grad=True)
    loss = functional.capi_loss(predicted, torch.zeros(3, 4, 5), torch.zeros(3, 0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    scores = torch.zeros(3, 5)
    scores[1, 2] = torch.nan
    for pair in ((scores, torch.zeros(3, 5)), (torch.zeros(3, 5), scores)):
        assert bool(prototype_cross_entropy(*pair).isnan())


S = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prototype_cross_entropy(S, S[:, :5]), ValueError, "teacher: expected 4 rows and 6 prototypes"),
        (lambda: prototype_cross_entropy(S, (S, S)), ValueError, "teacher: expected scores as for the student"),
        (lambda: prototype_cross_entropy([S], [S]), ValueError, "student: expected a crop beside"),
        (lambda: prototype_cross_entropy("x", S), TypeError, "student: expected a tensor"),
        (
            lambda: prototype_cross_entropy(S, S, potential=torch.zeros(5)),
            ValueError,
            r"potential: expected shape \[6\]",
        ),
        (
            lambda: prototype_cross_entropy(S, S, potential=torch.zeros(3, 6)),
            ValueError,
            "potential: expected positions",
        ),
        (lambda: prototype_cross_entropy(S, S, teacher_temperature=0), ValueError, "teacher_temperature: expected"),
        (lambda: prototype_cross_entropy(S, S, weights=-torch.ones(4)), ValueError, "weights: expected"),
        (lambda: fastcl.DINOLoss(6, centering="median"), ValueError, "centering: expected one of"),
        (lambda: fastcl.DINOLoss(6)(S, [S]), TypeError, "student: expected a list"),
        (lambda: fastcl.DINOLoss(7)([S, S], [S]), ValueError, r"student\[0\]: expected 7 prototypes"),
        (lambda: fastcl.DINOLoss(6)([], [S]), ValueError, "student: expected at least one crop"),
        (lambda: functional.dino_loss([S.long()] * 2, [S]), TypeError, r"student\[0\]: expected float64"),
        (lambda: functional.dino_loss([(S, S)] * 2, [(S[:, :5], S)]), ValueError, r"teacher\[0\]\[1\]: expected rows"),
        (lambda: functional.ibot_loss(S, None, S > 0), TypeError, "teacher: expected a tensor"),
        (lambda: fastcl.IBOTLoss(6)(S, S, S), TypeError, "mask: expected a bool tensor"),
        (lambda: fastcl.IBOTLoss(6)(S, S, torch.ones(2, 3) > 0), ValueError, "mask: expected 4 masked patches, got 6"),
        (lambda: fastcl.CapiLoss(6)(S, S), ValueError, "student: expected shape"),
        (lambda: fastcl.sinkhorn_potentials(S, S[:, :5]), ValueError, "prototypes: expected rows of dimension 6"),
        (lambda: fastcl.MSNLoss(entropy_weight=-1), ValueError, "entropy_weight: expected"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
