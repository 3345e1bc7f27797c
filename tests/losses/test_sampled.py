"""Products with sampled rows, and noise-contrastive estimation on them, against the plain formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import MemoryBank, SampledNCELoss, sampled_similarity
from fastcl.losses.sampled import draw
from fastcl.ops import sampled as sampled_op
from tests.support.strategies import DTYPES, generator
from tests.support.tolerances import HALF_ROWS

N, M, D, S = 7, 23, 6, 11


def rows(n: int, seed: int, dtype: torch.dtype = torch.float32, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=generator(seed)).to(dtype)


def samples(n: int = N, s: int = S, m: int = M, seed: int = 2) -> Tensor:
    return torch.randint(0, m, (n, s), generator=generator(seed))


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def allowed(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype) or 1e-5 + HALF_ROWS[dtype]


@pytest.mark.parametrize("blocks", [1, 7 * D, 1 << 20])
@pytest.mark.parametrize("dtypes", [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16)])
def test_products_and_their_gradients(monkeypatch, blocks, dtypes) -> None:
    monkeypatch.setattr(sampled_op, "CPU_BLOCK", blocks)
    x, y = (rows(n, seed, dtype).requires_grad_() for n, seed, dtype in zip((N, M), (0, 1), dtypes, strict=True))
    indices = samples()
    weights = rows(N, 3, d=S)
    got = sampled_similarity(x, y, indices.to(torch.int32))
    assert got.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    gradients = torch.autograd.grad((got * weights).sum(), (x, y))
    wide = [part.detach().double().requires_grad_() for part in (x, y)]
    truth = (wide[0][:, None] * wide[1][indices]).sum(2)
    assert error(got, truth) < (1e-12 if got.dtype == torch.float64 else 1e-6)
    expected = torch.autograd.grad((truth * weights).sum(), wide)
    for leaf, gradient, right in zip((x, y), gradients, expected, strict=True):
        assert gradient.dtype == leaf.dtype
        assert error(gradient, right) < allowed(leaf.dtype)


def test_never_holds_all_gathered_rows(monkeypatch) -> None:
    """It works in blocks of a thousand numbers; all gathered rows have 50 x 40 x 64."""
    monkeypatch.setattr(sampled_op, "CPU_BLOCK", 1000)
    most = 0
    plain = torch.bmm

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal most
        most = max(most, a.numel(), b.numel())
        return plain(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    x = rows(50, 0, d=64).requires_grad_()
    sampled_similarity(x, rows(90, 1, d=64), samples(50, 40, 90)).sum().backward()
    assert 500 < most <= 1000


def test_operator() -> None:
    x, y = rows(N, 0).requires_grad_(), rows(M, 1).requires_grad_()
    torch.library.opcheck(torch.ops.fastcl.sampled_fwd.default, (x, y, samples()))
    plain = x.detach(), y.detach(), samples(), rows(N, 3, d=S), [True, False]
    torch.library.opcheck(torch.ops.fastcl.sampled_bwd.default, plain)
    (gradient,) = torch.autograd.grad(sampled_similarity(x, y, samples()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()
    compiled = torch.compile(sampled_similarity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, samples()), sampled_similarity(x, y, samples()))


# The loss.


def a_bank(dtype: torch.dtype = torch.float32, known: int = M) -> MemoryBank:
    bank = MemoryBank(M, D, dtype=dtype)
    bank.update(torch.randperm(M, generator=generator(9))[:known], rows(known, 8))
    return bank


def one_row() -> MemoryBank:
    bank = MemoryBank(1, D)
    bank.update(torch.arange(1), rows(1, 8))
    return bank


def formula(
    form: str, x: Tensor, own: Tensor, negatives: Tensor, temperature: Tensor, log_z: float, normalize: bool
) -> Tensor:
    """Terms [N] from rows x and own [N, D] and negatives [N, S, D], as the papers write them."""
    if normalize:
        x = nn.functional.normalize(x, dim=1)
    positive, negative = (x * own).sum(1) / temperature, (x[:, None] * negatives).sum(2) / temperature
    if form == "infonce":
        return torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive
    if form == "pirl":
        total = negative.exp().sum(1, keepdim=True)
        h = [s.exp() / (s.exp() + total) for s in (positive[:, None], negative)]
        return -h[0].log()[:, 0] - (1 - h[1]).log().sum(1)
    noise = negative.shape[1] / (M - 1)
    h = [(s - log_z).exp() / ((s - log_z).exp() + noise) for s in (positive, negative)]
    return -h[0].log() - (1 - h[1]).log().sum(1)


@pytest.mark.parametrize("form", ["nce", "infonce", "pirl"])
@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize(("dtype", "log_z"), [(torch.float64, None), (torch.float32, 3.0), (torch.bfloat16, None)])
@pytest.mark.parametrize("normalize", [True, False])
def test_loss_is_the_papers(form, with_positives, dtype, log_z, normalize) -> None:
    bank = a_bank(torch.float32 if dtype == torch.float64 else dtype, known=M - 4)
    x, key = rows(N, 0, dtype).requires_grad_(), rows(N, 1, dtype).requires_grad_()
    indices, negatives = torch.arange(N), samples()
    temperature = nn.Parameter(torch.tensor(0.5))
    loss = SampledNCELoss(temperature, form=form, log_normalizer=log_z, normalize=normalize, reduction="none")
    given = {"positives": key} if with_positives else {}
    terms = loss(x, indices, bank, negatives=negatives, **given)
    assert terms.shape == (N,)
    leaves = [x, temperature, *given.values()]
    weights = torch.linspace(0.5, 2, N)
    gradients = torch.autograd.grad((terms * weights).sum(), leaves)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    stored = bank.rows.double()
    own = stored[indices]
    if with_positives:
        own = nn.functional.normalize(wide[2], dim=1) if normalize else wide[2]
    known = loss.log_normalizer.item()  # float32, estimated or given
    assert form != "nce" or log_z is None or known == log_z
    truth = formula(form, wide[0], own, stored[negatives], wide[1], known, normalize)
    counted = torch.ones(N, dtype=torch.bool) if with_positives else bank.filled[indices]
    assert with_positives or not counted.all()
    truth = torch.where(counted, truth, 0)
    assert error(terms, truth) < (1e-12 if dtype == torch.float64 else 1e-5)
    for leaf, gradient, right in zip(
        leaves, gradients, torch.autograd.grad((truth * weights).sum(), wide), strict=True
    ):
        tolerance = 1e-5 if leaf is temperature else allowed(dtype)
        assert error(gradient, right) < tolerance
    for reduction, expected in (("sum", truth.sum()), ("mean", truth.sum() / counted.sum())):
        loss = SampledNCELoss(temperature, form=form, log_normalizer=log_z, normalize=normalize, reduction=reduction)
        assert error(loss(x, indices, bank, negatives=negatives, **given), expected) < 1e-5


def test_an_update_after_the_forward_does_not_change_the_backward() -> None:
    gradients = []
    for meddle in (False, True):
        bank, x = a_bank(), rows(N, 0).requires_grad_()
        loss = SampledNCELoss(0.5)(x, torch.arange(N), bank, negatives=samples())
        if meddle:
            bank.update(torch.arange(M), rows(M, 77))
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert gradients[0].norm() > 0


def test_the_normalizer_is_estimated_once_and_kept() -> None:
    bank, x, indices = a_bank(), rows(N, 0), torch.arange(N)
    loss = SampledNCELoss(0.5, num_negatives=S)
    first = loss(x, indices, bank, negatives=samples())
    logits = (nn.functional.normalize(x, dim=1)[:, None] * bank.rows[samples()]).sum(2) / 0.5
    estimate = ((M - 1) * logits.exp().mean()).log()
    torch.testing.assert_close(loss.log_normalizer, estimate.double())
    kept = loss.log_normalizer.clone()
    loss(rows(N, 5), indices, bank)
    assert torch.equal(loss.log_normalizer, kept)
    other = SampledNCELoss(0.5)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(x, indices, bank, negatives=samples()), first)


CASTS = {
    "bfloat16": lambda loss: loss.bfloat16(),
    "half": lambda loss: nn.ModuleList([loss]).half()[0],
    "to": lambda loss: loss.to(torch.float32),
    "a copy": lambda loss: copy.deepcopy(loss).half(),
    "loaded": lambda loss: loaded(loss, assign=False),
    "assigned": lambda loss: loaded(loss, assign=True),
}


def loaded(loss: SampledNCELoss, assign: bool) -> SampledNCELoss:
    fresh = SampledNCELoss(0.5).half()
    fresh.load_state_dict(loss.state_dict(), assign=assign)
    return fresh


@pytest.mark.parametrize("given", [12.3456, None])
@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_rounds_the_normalizer(cast, given) -> None:
    """Given or estimated, it is not rounded before it meets rows of float64."""
    bank, x, indices, negatives = a_bank(torch.float64), rows(N, 0, torch.float64), torch.arange(N), samples()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = SampledNCELoss(0.5, log_normalizer=given)
    finally:
        torch.set_default_dtype(torch.float32)
    unit = nn.functional.normalize(x, dim=1)
    logits = (unit[:, None] * bank.rows[negatives]).sum(2) / 0.5
    log_z = given if given is not None else ((M - 1) * logits.exp().mean()).log().item()
    loss = CASTS[cast](loss)
    temperature = torch.tensor(0.5, dtype=torch.float64)
    truth = formula("nce", unit, bank.rows[indices], bank.rows[negatives], temperature, log_z, False).mean()
    for _ in range(2):
        assert error(loss(x, indices, bank, negatives=negatives), truth) < 1e-14
        assert loss.log_normalizer.item() == pytest.approx(log_z, rel=1e-15)
        loss = CASTS[cast](loss)
        loss(x.float(), indices, bank, negatives=negatives)  # reads it in float32, and leaves it


@pytest.mark.parametrize("assign", [False, True])
def test_states_with_a_normalizer_of_float32_load(assign) -> None:
    loss = SampledNCELoss(0.5)
    loss.load_state_dict({"log_normalizer": torch.tensor(2.5)}, assign=assign)
    assert (loss.log_normalizer.item(), loss.log_normalizer.dtype) == (2.5, torch.float64)
    loss.load_state_dict({"log_normalizer": torch.tensor(torch.nan)}, assign=assign)
    loss(rows(N, 0, torch.float64), torch.arange(N), a_bank(torch.float64), negatives=samples())
    assert loss.log_normalizer.dtype == torch.float64


@pytest.mark.parametrize("known", [M, M - 5, 2])
def test_negatives_are_drawn_evenly_and_never_oneself(known) -> None:
    bank = a_bank(known=known)
    there = set(bank.ids.tolist())
    g = generator(0)
    drawn = draw(bank, torch.arange(M), 4000, g)
    for i in range(M):
        others = there - {i}
        counts = torch.bincount(drawn[i], minlength=M)
        assert {j for j in range(M) if counts[j]} == others
        expected = 4000 / len(others)
        assert all(abs(int(counts[j]) - expected) < 6 * expected**0.5 for j in others)
    again = draw(bank, torch.arange(M), 4000, generator(0))
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("form", ["nce", "infonce", "pirl"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
def test_second_derivatives_raise(form, normalize, first, second) -> None:
    """In embeddings, temperature and positives, for every pair of them."""
    leaves = [rows(N, 0), torch.tensor(0.5), rows(N, 1)]
    for i in {first, second}:
        leaves[i].requires_grad_()
    x, temperature, key = leaves
    loss = SampledNCELoss(temperature, form=form, normalize=normalize, log_normalizer=1.0)
    value = loss(x, torch.arange(N), a_bank(), positives=key, negatives=samples())
    (gradient,) = torch.autograd.grad(value, leaves[first], create_graph=True)
    with pytest.raises(RuntimeError, match="SampledNCELoss: second derivatives are not supported"):
        gradient.square().sum().backward()


def test_a_hessian_raises() -> None:
    loss, bank = SampledNCELoss(0.5, log_normalizer=1.0), a_bank()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.functional.hessian(lambda x: loss(x, torch.arange(N), bank, negatives=samples()), rows(N, 0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_compiled_with_its_gradients() -> None:
    loss, bank = SampledNCELoss(nn.Parameter(torch.tensor(0.5)), log_normalizer=1.0), a_bank()
    x, key = rows(N, 0).requires_grad_(), rows(N, 1).requires_grad_()
    call = lambda: loss(x, torch.arange(N), bank, positives=key, negatives=samples())  # noqa: E731
    leaves = [x, key, loss.temperature]
    value = call()
    expected = torch.autograd.grad(value, leaves)
    compiled = torch.compile(
        lambda x, key, negatives: loss(x, torch.arange(N), bank, positives=key, negatives=negatives),
        fullgraph=True,
        backend="aot_eager",
    )(x, key, samples())
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), expected)


def test_pirl_at_the_ends_of_its_range() -> None:
    """Far positives and negatives, and no negatives: digits and gradients stay."""
    bank = MemoryBank(3, 2)
    bank.update(torch.arange(3), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    loss = SampledNCELoss(0.005, form="pirl", reduction="none")
    indices, two = torch.zeros(2, dtype=torch.int64), torch.tensor([[1, 2], [1, 2]])
    terms = loss(x, indices, bank, negatives=two)
    # The two negatives share everything: h = 1 / 3 each. The second positive is 400 below their log-sum-exp.
    both = 2 * math.log(1.5)
    torch.testing.assert_close(terms, torch.tensor([both, both + 400 + math.log(2)]))
    assert torch.autograd.grad(terms.sum(), x)[0].isfinite().all()
    assert loss(x, indices, bank, negatives=two[:, :0]).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_indices(dtype) -> None:
    bank, indices, chosen = a_bank(), torch.arange(N), samples()
    x = rows(N, 0)
    loss = SampledNCELoss(0.5, log_normalizer=1.0)
    expected = loss(x, indices, bank, negatives=chosen)
    assert torch.equal(loss(x, indices.to(dtype), bank, negatives=chosen.to(dtype)), expected)
    products = sampled_similarity(x, bank.rows, chosen.to(dtype))
    assert torch.equal(products, sampled_similarity(x, bank.rows, chosen))
    with pytest.raises(ValueError, match=r"^indices: expected numbers from 0 to 6, got"):
        sampled_similarity(x, x, torch.full((N, 2), 200).to(dtype))


@pytest.mark.parametrize("form", ["nce", "infonce", "pirl"])
def test_no_anchors(form) -> None:
    loss = SampledNCELoss(0.5, form=form)
    x = rows(0, 0).requires_grad_()
    value = loss(x, torch.arange(0), a_bank(), negatives=samples(0))
    value.backward()
    assert value == 0
    assert loss.log_normalizer.isnan()  # NaN until a call with anchors estimates it


def test_the_normalizer_is_of_finite_rows_that_count() -> None:
    bank = a_bank(known=M - 4)
    known = bank.ids[:3]
    unknown = int((~bank.filled).nonzero()[0])
    x = rows(5, 0)
    x[3] = torch.inf
    indices = torch.tensor([*known.tolist(), 0, unknown])
    indices[3] = known[0]
    clean, loss = SampledNCELoss(0.5, normalize=False), SampledNCELoss(0.5, normalize=False, reduction="none")
    clean(x[:3], indices[:3], bank, negatives=samples(5)[:3])
    with torch.inference_mode():
        loss(x, indices, bank, negatives=samples(5))
    torch.testing.assert_close(loss.log_normalizer, clean.log_normalizer)
    x[3] = 1
    x.requires_grad_()
    loss(x, indices, bank, negatives=samples(5)).sum().backward()  # estimated in inference mode, and fit for training
    assert x.grad.isfinite().all()
    assert not x.grad[4].any()


def test_repr() -> None:
    expected = "temperature=0.2 (learned), num_negatives=5, form='nce', normalize=False, reduction='mean'"
    loss = SampledNCELoss(nn.Parameter(torch.tensor(0.2)), num_negatives=np.int64(5), normalize=False)
    assert repr(loss) == f"SampledNCELoss({expected})"


def test_training_on_draws() -> None:
    """A row moves towards its own row of the bank."""
    bank, indices = a_bank(), torch.arange(N)
    x = rows(N, 0).requires_grad_()
    loss = SampledNCELoss(0.2, num_negatives=16)
    cosine = lambda: nn.functional.cosine_similarity(x, bank.rows[:N]).mean().item()  # noqa: E731
    before = cosine()
    for _ in range(30):
        (gradient,) = torch.autograd.grad(loss(x, indices, bank, generator=generator(1)), x)
        x.data -= gradient
    assert cosine() > before + 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: SampledNCELoss(num_negatives=0), r"^num_negatives: expected at least 1"),
        (lambda b: SampledNCELoss(form="x"), r"^form: expected one of 'nce', 'infonce', 'pirl'"),
        (lambda b: SampledNCELoss(reduction="x"), r"^reduction: expected"),
        (lambda b: SampledNCELoss()(rows(2, 0), torch.arange(2), rows(9, 0)), r"^bank: expected a MemoryBank"),
        (lambda b: SampledNCELoss()(rows(2, 0), torch.arange(3), b), r"^indices: expected shape \[2\], got \[3\]"),
        (lambda b: SampledNCELoss()(rows(1, 0), torch.tensor([M]), b), rf"^indices: expected .* {M - 1}, got {M}"),
        (lambda b: SampledNCELoss()(rows(2, 0, d=5), torch.arange(2), b), r"^bank: expected rows of dimension 5"),
        (
            lambda b: SampledNCELoss()(rows(2, 0), torch.arange(2), b, positives=rows(3, 0)),
            r"^positives: expected shape \[2, 6\], as embeddings, got \[3, 6\]",
        ),
        (
            lambda b: SampledNCELoss()(rows(2, 0), torch.arange(2), b, negatives=samples(3)),
            r"^negatives: expected shape \[2, S\], got \[3, 11\]",
        ),
        (
            lambda b: SampledNCELoss()(rows(2, 0), torch.arange(2), MemoryBank(9, D)),
            r"^bank: expected at least 2 rows",
        ),
        (
            lambda b: SampledNCELoss()(rows(2, 0), torch.arange(2), b, negatives=samples(2, 0)),
            r"^negatives: expected at least one",
        ),
        (
            lambda b: SampledNCELoss()(rows(1, 0), torch.arange(1), one_row(), negatives=samples(1, m=1)),
            r"^bank: expected at least 2 rows",
        ),
        (
            lambda b: SampledNCELoss()(rows(2, 0), torch.arange(2), b, generator=3),
            r"^generator: expected a torch.Generator, got int",
        ),
        (lambda b: sampled_similarity(rows(2, 0), rows(3, 0), samples(2) + 5), r"^indices: expected numbers from 0"),
        (lambda b: sampled_similarity(rows(2, 0), rows(3, 0), samples(2).float()), r"^indices: expected integers"),
        (lambda b: sampled_similarity(rows(2, 0), rows(3, 0), samples(2)[0]), r"^indices: expected shape \[2, S\]"),
    ],
)
def test_errors_name_the_argument(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(a_bank())


def test_in_the_namespace() -> None:
    assert {"SampledNCELoss", "sampled_similarity"} <= set(fastcl.__all__)
