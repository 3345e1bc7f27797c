"""Soft assignments: the loss and its statistics against the plain formula."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from fastcl.functional import cluster_infonce, contrastive_stats, sinkhorn
from tests.support.backends import INTERPRETED, QUICK, VARIANTS, needs_interpreter, running
from tests.support.oracle import TRUTH, Evaluation, differentiate, eager_evaluations, similarities
from tests.support.pairs import pairs
from tests.support.strategies import DTYPES, generator, rows
from tests.support.tolerances import accumulation_dtype, check

# Terms that cancel: log-sum-exps and the mean; in the mean's derivative the sum and the weights.
CANCELLING = (Evaluation(part="denominator"), Evaluation(part="sum"), Evaluation(part="weights"))


def admissible_pairs(n: int, m: int | None, ids: Tensor | None, contrast_ids: Tensor | None) -> Tensor:
    if m is None:
        return ~torch.eye(n, dtype=torch.bool)
    if ids is None or contrast_ids is None:
        return torch.ones(n, m, dtype=torch.bool)
    return (ids[:, None] != contrast_ids) | (ids[:, None] < 0)


def loss_of_rows(s: Tensor, w: Tensor, allowed: Tensor, part: str | None) -> tuple[Tensor, Tensor]:
    """Of each row, 0 where it does not count; which do."""
    w = torch.where(allowed, w, 0.0)
    counts = w.sum(1) > 0
    s, w, allowed = s[counts], w[counts], allowed[counts]
    bottom = s.masked_fill(~allowed, -torch.inf).logsumexp(1)
    total, weight = (w * torch.where(allowed, s, 0.0)).sum(1), w.sum(1)
    if part in ("denominator", "constant norms"):
        terms = bottom if part == "denominator" else bottom - total / weight
    elif part == "sum":
        terms = total / weight.detach()
    elif part == "weights":
        terms = total.detach() / weight
    else:
        terms = bottom - total / weight
    return s.new_zeros(len(counts)).masked_scatter(counts, terms), counts


def formula(
    embeddings: Tensor,
    assignments: Tensor,
    *,
    contrasts: Tensor | None = None,
    contrast_assignments: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    contrast_bias: Tensor | None = None,
    weights: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    how: Evaluation = TRUTH,
) -> Tensor:
    shape = embeddings.shape[:-1]
    views = 1 if embeddings.dim() == 2 else shape[1]
    x = embeddings.to(how.dtype).reshape(-1, embeddings.shape[-1])
    r = assignments.to(how.dtype)
    r = r.reshape(-1, r.shape[-1]) if r.dim() == 3 else r.repeat_interleave(views, 0)
    y = x if contrasts is None else contrasts.to(how.dtype)
    if contrasts is None:
        q = r
    elif contrast_assignments is None:
        q = torch.cat((r, r.new_zeros(len(y) - len(x), r.shape[1])))
    else:
        q = contrast_assignments.to(how.dtype)
    s = similarities(x, y, 1 / torch.as_tensor(temperature, dtype=how.dtype), normalize, normalize, how)
    if contrast_bias is not None:
        s = s + contrast_bias.to(how.dtype)
    own_ids = None if ids is None else ids.repeat_interleave(views)
    allowed = admissible_pairs(len(x), None if contrasts is None else len(y), own_ids, contrast_ids)
    part = how.part
    terms, counts = loss_of_rows(s, r @ q.T, allowed, part)
    w = torch.ones(len(x), dtype=how.dtype) if weights is None else weights.to(how.dtype).repeat_interleave(views)
    if reduction == "none":
        result = terms * w
    else:
        total = (w * counts).sum() if part is None else (w * counts).sum().detach()
        result = (terms * w).sum() / (total if reduction == "mean" and total > 0 else 1)
    if symmetric:
        terms, counts = loss_of_rows(s.T, q @ r.T, allowed.T, part)
        if reduction == "none":
            result = (result + terms) / 2
        else:
            result = (result + terms.sum() / (counts.sum().clamp(min=1) if reduction == "mean" else 1)) / 2
    return result.reshape(shape) if reduction == "none" else result


def objective(loss: Tensor) -> Tensor:
    if loss.dim() == 0:
        return loss
    return (loss * torch.rand(loss.shape, generator=generator(5), dtype=torch.float64).to(loss.dtype)).sum()


def library(embeddings: Tensor, assignments: Tensor, **options: Any) -> Tensor:
    return cluster_infonce(embeddings, assignments=assignments, **options)


def check_loss(arguments: dict[str, Any], backends: tuple[str, ...] = VARIANTS) -> None:
    """Value and gradients by the error rule."""
    floating = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
    leaves = tuple(name for name in floating if name != "weights")
    embeddings, contrasts = arguments["embeddings"], arguments.get("contrasts")
    dtypes = [embeddings.dtype] + ([] if contrasts is None else [contrasts.dtype])
    accumulation = accumulation_dtype(*dtypes)
    product = torch.promote_types(dtypes[0], dtypes[-1])
    expected_dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    judged = expected_dtype if accumulation == torch.float64 else accumulation

    def evaluate(how: Evaluation) -> Any:
        return differentiate(formula, arguments, leaves, objective, how.dtype, how=how)

    truth, true_gradients = evaluate(TRUTH)
    parts = [evaluate(how) for how in CANCELLING]
    draws = [evaluate(how) for how in eager_evaluations(judged)]
    for backend in backends:
        with running(backend):
            got, gradients = differentiate(library, arguments, leaves, objective)
        assert got.dtype == expected_dtype
        check(
            f"{backend} loss",
            got,
            truth,
            [value for value, _ in draws],
            accumulation=judged,
            magnitude=sum(part.abs() for part, _ in parts[:2]),
        )
        for name, value in true_gradients.items():
            assert gradients[name].dtype == arguments[name].dtype
            check(
                f"{backend} gradient of {name}",
                gradients[name],
                value,
                [g[name] for _, g in draws],
                accumulation=judged,
                half_rows=product if name in ("embeddings", "contrasts") else None,
                magnitude=sum(g[name].abs() for _, g in parts),
            )


def problem(
    n: int = 9,
    d: int = 6,
    c: int = 4,
    *,
    views: int = 0,
    by_view: bool = False,
    m: int | None = None,
    kind: str = "random",
    peak: float = 2.0,
    dtype: torch.dtype = torch.float32,
    assignment_dtype: torch.dtype | None = None,
    bias: bool = False,
    ids: bool = False,
    paired: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of a call. m: contrasts, None for self-contrast; paired: contrasts with the anchors' assignments.

    Assignments are a softmax of `peak` times normal numbers, for each sample or view. Converged rows with the same
    largest one lie close together.
    """
    g = generator(seed)
    flat = n * max(views, 1)
    of_samples = flat if by_view else n
    count = of_samples + (0 if m is None else m)
    logits = peak * torch.randn(count, c, generator=g, dtype=torch.float64)
    r = logits.softmax(1)
    r[torch.rand(count, generator=g) < 0.1] = 0  # rows without assignments
    groups = r.argmax(1)
    own = groups[:of_samples].repeat_interleave(flat // of_samples)
    x = rows(kind, torch.cat((own, groups[of_samples:])), d, g, unit=False)
    shape = (n, views) if views else (n,)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    weights_dtype = assignment_dtype or accumulation
    arguments: dict[str, Any] = {
        "embeddings": x[:flat].reshape(*shape, d).to(dtype),
        "assignments": r[:of_samples].reshape(*(shape if by_view else (n,)), c).to(weights_dtype),
        "temperature": torch.tensor(0.05 if kind == "converged" else 0.2, dtype=accumulation),
    }
    if m is not None:
        arguments["contrasts"] = x[flat:].to(dtype)
        if not paired:
            arguments["contrast_assignments"] = r[of_samples:].to(weights_dtype)
    if ids:
        arguments["ids"] = torch.randint(-1, 4, (n,), generator=g)
        arguments["contrast_ids"] = torch.randint(-1, 4, (m or 0,), generator=g)
    if bias:
        arguments["contrast_bias"] = torch.randn(flat if m is None else m, generator=g, dtype=torch.float64).to(
            accumulation
        )
    return arguments | options


SIZES = st.one_of(st.sampled_from([1, 2, 3, 17, 66]), st.integers(1, 40))


@st.composite
def problems(draw, dtypes=DTYPES) -> dict[str, Any]:
    views = draw(st.sampled_from([0, 0, 1, 2, 3]))
    n = draw(SIZES)
    two_sets = draw(st.booleans())
    paired = two_sets and draw(st.booleans())
    m = (n * max(views, 1) + draw(st.sampled_from([0, 1, 9])) if paired else draw(SIZES)) if two_sets else None
    symmetric = two_sets and draw(st.booleans())
    same = m == n * max(views, 1)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["weights"] = torch.rand(n, generator=generator(draw(st.integers(0, 9)))) + 0.05
    return problem(
        n, draw(SIZES), draw(st.sampled_from([1, 2, 5, 33, 70])), views=views, m=m,
        by_view=views > 0 and draw(st.booleans()), kind=draw(st.sampled_from(["random", "converged"])),
        peak=draw(st.sampled_from([0.5, 3.0, 30.0])), dtype=draw(st.sampled_from(dtypes)),
        assignment_dtype=draw(st.sampled_from([None, None, *DTYPES])), bias=draw(st.booleans()),
        ids=two_sets and draw(st.booleans()), paired=paired, seed=draw(st.integers(0, 99)),
        symmetric=symmetric, normalize=draw(st.booleans()),
        reduction=draw(st.sampled_from(["mean", "sum", *(["none"] if same or not symmetric else [])])), **options,
    )  # fmt: skip


@settings(max_examples=25)
@given(problems())
def test_matches_the_formula(arguments) -> None:
    check_loss(arguments, QUICK)


@needs_interpreter
@settings(max_examples=12)
@given(problems(DTYPES[1:]))
def test_triton_matches_the_formula(arguments) -> None:
    check_loss(arguments, INTERPRETED)


@pairs(dtype=DTYPES, views=[0, 2], two_sets=[False, True])
def test_converged_rows(dtype, views, two_sets) -> None:
    """Softmax and positive part cancel; in the assignments' gradient logits and their mean."""
    n = 33
    arguments = problem(
        n, 64, 30, views=views, m=n * max(views, 1) if two_sets else None, kind="converged", peak=40.0, dtype=dtype,
        paired=two_sets, symmetric=two_sets,
    )  # fmt: skip
    check_loss(arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none", "views": 2},
        {"views": 3, "by_view": True, "bias": True},
        {"m": 13, "symmetric": True, "ids": True, "bias": True},
        {"m": 9, "symmetric": True, "reduction": "none", "weights": torch.arange(9.0)},
        {"m": 12, "paired": True, "normalize": False, "reduction": "sum"},
    ],
)
def test_options(options) -> None:
    check_loss(problem(**options, dtype=torch.float64))


# Properties of the formula


def test_hard_assignments_are_clusters(backend) -> None:
    arguments = problem(20, 8, views=2, dtype=torch.float64)
    clusters = torch.randint(0, 5, (20,), generator=generator(1))
    hard = torch.nn.functional.one_hot(clusters, 5).double()
    expected = cluster_infonce(arguments["embeddings"], clusters)
    torch.testing.assert_close(cluster_infonce(arguments["embeddings"], assignments=hard), expected)


def test_a_row_of_assignments_may_be_scaled(backend) -> None:
    """Both sums over its contrasts are; in two sets the other direction's not."""
    arguments = problem(8, 5, 3, m=11, dtype=torch.float64, reduction="none")
    expected = library(**arguments)
    scaled = arguments | {"assignments": arguments["assignments"] * torch.arange(1.0, 9.0)[:, None]}
    torch.testing.assert_close(library(**scaled), expected)


def test_rows_without_weight_do_not_count(backend) -> None:
    """Disjoint, zero, or a single row: no loss, no gradient, no NaN."""
    x = torch.randn(4, 3, generator=generator(0)).requires_grad_()
    r = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]]).requires_grad_()
    loss = cluster_infonce(x, assignments=r, reduction="none")
    assert (loss == 0).tolist() == [False, False, True, True]
    for gradient in torch.autograd.grad(loss.sum(), [x, r]):
        assert gradient.isfinite().all()
    for n in (1, 4):
        alone = torch.eye(n).requires_grad_()
        z = x[:n].detach().requires_grad_()
        nothing = cluster_infonce(z, assignments=alone)
        assert nothing.item() == 0
        for gradient in torch.autograd.grad(nothing, [z, alone]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_rows(backend) -> None:
    x, r = torch.ones(0, 3).requires_grad_(), torch.ones(0, 2).requires_grad_()
    for loss in (
        cluster_infonce(x, assignments=r),
        cluster_infonce(x, assignments=r, contrasts=torch.ones(2, 3), contrast_assignments=torch.ones(2, 2)),
        cluster_infonce(
            torch.ones(2, 3), assignments=torch.ones(2, 2), contrasts=x, contrast_assignments=r, symmetric=True
        ),
    ):
        assert loss.item() == 0
        gradients = torch.autograd.grad(loss, [x, r], allow_unused=True, materialize_grads=True)
        assert [gradient.shape for gradient in gradients] == [x.shape, r.shape]


# Derivatives

EXACT = pytest.mark.parametrize("backend", QUICK, indirect=True)


@EXACT
def test_gradcheck(backend) -> None:
    arguments = problem(6, 3, 4, m=7, dtype=torch.float64, bias=True, symmetric=True)
    for name in ("assignments", "contrast_assignments"):
        arguments[name] = arguments[name] + 0.1  # so that finite differences leave none negative
    names = [name for name in arguments if name != "symmetric"]
    inputs = [arguments[name].requires_grad_() for name in names]
    for extra in ({}, {"ids": torch.tensor([0, 1, 1, -1, 2, 3]), "contrast_ids": torch.tensor([1, 1, 5, -1, 2, 2, 0])}):

        def loss(*values: Tensor, extra=extra) -> Tensor:
            return library(**dict(zip(names, values, strict=True)), symmetric=True, **extra)

        assert torch.autograd.gradcheck(loss, inputs)


@EXACT
@pytest.mark.parametrize("views", [0, 2])
def test_training_through_sinkhorn(views, backend) -> None:
    """Gradients reach embeddings and learned prototypes, as through the plain formula."""
    g = generator(2)
    shape = (12, 2, 5) if views else (12, 5)
    x = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    prototypes = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()

    def loss(of: Any) -> Tensor:
        scores = (x.mean(1) if views else x) @ prototypes.T
        return of(x, sinkhorn(scores, epsilon=0.5).assignments)

    got = torch.autograd.grad(loss(library), [x, prototypes])
    expected = torch.autograd.grad(loss(formula), [x, prototypes])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    if not views:
        assert torch.autograd.gradcheck(
            lambda x, p: library(x, sinkhorn(x @ p.T, epsilon=0.5).assignments), (x, prototypes)
        )


def test_second_derivatives_raise(backend) -> None:
    x, r = torch.randn(5, 3).requires_grad_(), torch.rand(5, 2).requires_grad_()
    for first in torch.autograd.grad(cluster_infonce(x, assignments=r), [x, r], create_graph=True):
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            first.square().sum().backward(retain_graph=True)


def test_statistics(backend) -> None:
    arguments = problem(9, 6, 4, m=12, dtype=torch.float64, ids=True)
    x, y = arguments["embeddings"].requires_grad_(), arguments["contrasts"].requires_grad_()
    r = arguments["assignments"].requires_grad_()
    q = arguments["contrast_assignments"].requires_grad_()
    names = {"anchor_ids": arguments["ids"], "contrast_ids": arguments["contrast_ids"]}
    stats = contrastive_stats(
        x, y, anchor_assignments=r, contrast_assignments=q, logit_scale=2.0, normalize_anchors=True, both=True, **names
    )
    allowed = admissible_pairs(9, 12, arguments["ids"], arguments["contrast_ids"])
    s = 2 * torch.nn.functional.normalize(x, dim=1) @ y.T
    w = torch.where(allowed, r @ q.T, 0)
    for side, s_, w_, allowed_ in ((stats, s, w, allowed), (stats.reverse, s.T, w.T, allowed.T)):
        torch.testing.assert_close(side.lse_all, s_.masked_fill(~allowed_, -torch.inf).logsumexp(1))
        torch.testing.assert_close(side.sum_pos, (w_ * s_).sum(1))
        torch.testing.assert_close(side.num_pos, w_.sum(1))
        torch.testing.assert_close(side.num_neg, allowed_.sum(1) - w_.sum(1))
        assert torch.equal(side.valid, w_.sum(1) > 0)
        assert side.lse_pos is None
        assert side.lse_neg is None
    coefficients = torch.rand(9, generator=generator(1), dtype=torch.float64)
    got = torch.autograd.grad((stats.num_neg * stats.sum_pos * coefficients)[stats.valid].sum(), [x, y, r, q])
    expected = torch.autograd.grad(((allowed.sum(1) - w.sum(1)) * (w * s).sum(1) * coefficients).sum(), [x, y, r, q])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    zeros = torch.zeros_like(r, requires_grad=True)  # a row without weight still has a log-sum-exp
    lse = contrastive_stats(x, anchor_assignments=zeros, normalize_anchors=True).lse_all
    plain = contrastive_stats(x, normalize_anchors=True).lse_all
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x)[0] for value in (lse, plain)))
    ones = torch.eye(9, dtype=torch.float64).requires_grad_()  # disjoint: a weight of 0 has a derivative too
    alone = contrastive_stats(x, anchor_assignments=ones, logit_scale=2.0)
    weights = (ones @ ones.T).fill_diagonal_(0)
    for value, plain in ((alone.num_pos, weights), (alone.sum_pos, weights * (2 * x @ x.T).detach())):
        got, expected = (torch.autograd.grad(v.sum(), ones, retain_graph=True)[0] for v in (value, plain))
        torch.testing.assert_close(got, expected)
    quotients = (alone.lse_all - alone.sum_pos / alone.num_pos)[alone.valid].sum()
    for gradient in torch.autograd.grad(quotients, [x, ones]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    only = contrastive_stats(x, anchor_assignments=r, want=("lse_all",))
    assert only.sum_pos is None
    torch.testing.assert_close(only.num_pos, (r @ r.T).fill_diagonal_(0).sum(1))


# Errors

X, R = torch.ones(4, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clusters": torch.arange(4)}, ValueError, "clusters: expected None with assignments"),
        ({"positives": X}, ValueError, "positives: expected None with assignments"),
        ({"form": "inside"}, ValueError, "form: expected 'outside' with assignments, got 'inside'"),
        ({"denominator": "negatives"}, ValueError, "denominator: expected 'all' with assignments, got 'negatives'"),
        ({"margin": 0.1}, ValueError, "margin: expected 0.0 with assignments, got 0.1"),
        ({"contrasts": X, "contrast_clusters": torch.arange(4)}, ValueError, "contrast_clusters: expected None"),
        (
            {"assignments": None, "contrasts": X, "contrast_assignments": R},
            ValueError,
            "assignments: expected a tensor",
        ),
        ({"assignments": [1.0]}, TypeError, "assignments: expected a tensor"),
        ({"assignments": torch.ones(4, 2, dtype=torch.long)}, TypeError, "assignments: expected float64, float32"),
        ({"assignments": torch.ones(3, 2)}, ValueError, r"assignments: expected shape \[4, C\], got \[3, 2\]"),
        ({"assignments": torch.ones(4)}, ValueError, r"assignments: expected shape \[4, C\], got \[4\]"),
        ({"assignments": torch.ones(4, 0)}, ValueError, r"assignments: expected shape \[4, C\], got \[4, 0\]"),
        ({"assignments": torch.ones(4, 1, 2)}, ValueError, r"assignments: expected shape \[4, C\], got \[4, 1, 2\]"),
        ({"assignments": -R}, ValueError, "assignments: expected finite numbers of at least 0, got -1"),
        ({"assignments": R * torch.inf}, ValueError, "assignments: expected finite numbers of at least 0, got inf"),
        ({"assignments": R * torch.nan}, ValueError, "assignments: expected finite numbers of at least 0, got nan"),
        ({"contrast_assignments": R}, ValueError, "contrast_assignments: expected None for self-contrast"),
        ({"ids": torch.arange(4)}, ValueError, "ids: expected None for self-contrast"),
        ({"contrasts": X, "ids": torch.arange(4)}, ValueError, "contrast_ids: expected a tensor, as ids is given"),
        ({"contrasts": X[:3]}, ValueError, "contrasts: expected at least 4 rows, one for each anchor row"),
        (
            {"contrasts": X[:3], "contrast_assignments": torch.ones(3, 5)},
            ValueError,
            r"contrast_assignments: expected shape \[3, 2\], got \[3, 5\]",
        ),
        ({"contrasts": fastcl.MemoryQueue(3, 3)}, ValueError, "contrasts: expected tensors"),
        ({"return_stats": True}, ValueError, "return_stats: expected False with assignments"),
        ({"symmetric": True}, ValueError, "symmetric: expected False for self-contrast"),
        ({"contrast_bias": torch.ones(3)}, ValueError, r"contrast_bias: expected shape \[4\]"),
    ],
)
def test_errors(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        cluster_infonce(X, **({"assignments": R} | arguments))


def test_errors_of_views() -> None:
    with pytest.raises(ValueError, match=r"assignments: expected shape \[4, 2, C\], got \[4, 3, 5\]"):
        cluster_infonce(torch.ones(4, 2, 3), assignments=torch.ones(4, 3, 5))
    with pytest.raises(ValueError, match="at least one view"):
        cluster_infonce(torch.ones(4, 0, 3), assignments=R)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchor_clusters": torch.arange(4)}, "anchor_clusters: expected None with assignments"),
        ({"contrast_assignments": R}, "contrast_assignments: expected None for self-contrast"),
        ({"want": ("lse_neg",)}, "want: expected some of 'lse_all', 'sum_pos' with assignments"),
        ({"logit_scale": torch.ones(2)}, "logit_scale: expected one scale with assignments"),
        ({"anchor_assignments": -R}, "anchor_assignments: expected finite numbers of at least 0"),
    ],
)
def test_errors_of_the_statistics(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive_stats(X, **({"anchor_assignments": R} | arguments))


def test_statistics_of_two_sets_take_both_assignments() -> None:
    with pytest.raises(TypeError, match="contrast_assignments: expected a tensor, got NoneType"):
        contrastive_stats(X, X, anchor_assignments=R)
    with pytest.raises(TypeError, match="anchor_assignments: expected a tensor, got NoneType"):
        contrastive_stats(X, X, contrast_assignments=R)


def test_the_module_takes_assignments() -> None:
    loss = fastcl.ClusterInfoNCE(torch.nn.Parameter(torch.tensor(0.2)))
    arguments = problem(8, 3, 4, m=9)
    del arguments["temperature"]
    got = loss(**arguments)
    torch.testing.assert_close(got, library(**arguments, temperature=0.2))
    got.backward()
    assert loss.temperature.grad is not None
