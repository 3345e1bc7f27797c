"""Losses of few rows in one node of autograd's graph: they equal the usual way, which takes all unusual calls.

The tests of each loss compare both with its formula.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl.functional import (
    arcface_loss,
    barlow_twins_loss,
    hypersphere_loss,
    koleo_loss,
    multi_similarity_loss,
    vicreg_loss,
)
from fastcl.losses import small_prototypes
from fastcl.ops import at_once, small
from fastcl.ops.backends import choose, native
from fastcl.ops.contrastive.small_statistics import LogSums
from fastcl.ops.topk.small import nearest_other
from fastcl.statistics import contrastive_stats
from tests.support.strategies import generator

pytestmark = pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")

N, D, C = 12, 7, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 2, 1, 0, 0, 1, 2, 3])
LONERS = torch.tensor([0, 1, -2, 3, -1, 2, 1, 0, 0, 1, 2, 4])


class Case(NamedTuple):
    loss: Callable[..., Tensor]
    shapes: tuple[tuple[int, int], ...] = ((N, D), (N, D))
    engine: bool = True  # whether it takes the engine, and so depends on the backend
    half: bool = True
    further: bool = False  # whether it has second derivatives


def swav(*crops: Tensor, high: int = 2, **options) -> Tensor:
    return fastcl.SwAVLoss(**options)(list(crops[:high]), crops[high:])


def square(loss: Callable[..., Tensor], **options) -> Case:
    return Case(partial(loss, **options), engine=False, further=True)


ONE, CLASSES = ((N, D),), ((N, D), (C, D))
CASES = {
    "vicreg": square(vicreg_loss),
    "vicreg, wide": Case(vicreg_loss, ((6, 19), (6, 19)), engine=False, further=True),
    "vicreg, options": square(vicreg_loss, lambda_param=-2.0, mu_param=3.0, nu_param=7.0, eps=0.3),
    "vicreg, one feature": Case(vicreg_loss, ((4, 1), (4, 1)), engine=False, further=True),
    "barlow": square(barlow_twins_loss),
    "barlow, wide": Case(barlow_twins_loss, ((6, 19), (6, 19)), engine=False, further=True),
    "barlow, options": square(barlow_twins_loss, lambda_param=0.3, scale=-0.5),
    "koleo": Case(koleo_loss, ONE, further=True),
    "koleo, sum": Case(partial(koleo_loss, eps=0.1, reduction="sum"), ONE, further=True),
    "koleo, two rows": Case(koleo_loss, ((2, 3),), further=True),
    "hypersphere": Case(hypersphere_loss),
    "hypersphere, options": Case(partial(hypersphere_loss, t=3.0, lam=-0.5)),
    "arcface": Case(lambda x, y: arcface_loss(x, LABELS, y), CLASSES),
    "arcface, sum": Case(
        lambda x, y: arcface_loss(x, LABELS.int(), y, margin=60.0, scale=3.0, reduction="sum"), CLASSES
    ),
    "arcface, flat": Case(lambda x, y: arcface_loss(x, LABELS.to(torch.uint8), y, margin=170.0), CLASSES),
    "arcface, many classes": Case(lambda x, y: arcface_loss(x, LABELS, y), ((N, D), (40, D))),
    "arcface, strided labels": Case(
        lambda x, y: arcface_loss(x, LABELS.repeat_interleave(2)[::2], y), ((N, D), (40, D))
    ),
    "arcface, one class": Case(lambda x, y: arcface_loss(x, 0 * LABELS, y), ((N, D), (1, D))),
    "arcface, one row": Case(lambda x, y: arcface_loss(x, LABELS[2:3], y), ((1, D), (C, D))),
    "arcface, module": Case(lambda x, y: fastcl.ArcFaceLoss(C, D)(x, LABELS, prototypes=y), CLASSES),
    "multi-similarity": Case(lambda x: multi_similarity_loss(x, LABELS), ONE),
    "multi-similarity, options": Case(
        lambda x: multi_similarity_loss(x, LONERS, alpha=3.0, beta=20.0, base=-0.1, reduction="sum"), ONE
    ),
    "multi-similarity, strided labels": Case(lambda x: multi_similarity_loss(x, LONERS.repeat_interleave(2)[::2]), ONE),
    "multi-similarity, two sets": Case(
        lambda x, y: multi_similarity_loss(x, LONERS, y, torch.tensor([0, -1, 2, -3, 4])), CLASSES
    ),
    "multi-similarity, one row": Case(lambda x: multi_similarity_loss(x, LABELS[:1]), ((1, D),)),
    "swav": Case(swav, half=False),
    "swav, crops": Case(partial(swav, high=1, temperature=0.3, epsilon=0.1, n_iters=5), ((N, D),) * 3, half=False),
}
each = pytest.mark.parametrize("name", CASES)
FIRST = ["vicreg", "barlow", "koleo", "hypersphere", "arcface", "multi-similarity", "swav"]
one_of_each = pytest.mark.parametrize("name", FIRST)


def rows(name: str, dtype: torch.dtype = torch.float32, near: bool = False) -> list[Tensor]:
    """near: rows close to one another."""
    found = []
    for k, shape in enumerate(CASES[name].shapes):
        x = torch.randn(shape, generator=generator(k), dtype=torch.float64)
        if near:
            x = torch.randn(1, shape[1], generator=generator(9), dtype=torch.float64) + 0.01 * x
        found.append(x.to(dtype).requires_grad_())
    return found


def is_at_once(loss: Tensor) -> bool:
    assert loss.grad_fn is not None
    return loss.grad_fn.name() == "AtOnceBackward"


def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes the usual way."""
    monkeypatch.setattr(at_once, "MOST", 0)
    monkeypatch.setattr(small, "MOST", 0)
    monkeypatch.setattr(small_prototypes, "FEW", 0)


def error(got: Tensor, truth: Tensor) -> float:
    return (got.detach().double() - truth.detach()).norm().item()


@each
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_those_of_the_usual_way(name: str, dtype: torch.dtype, near: bool, monkeypatch) -> None:
    case, given = CASES[name], rows(name, dtype, near)
    value = case.loss(*given)
    assert is_at_once(value) == (case.half or dtype.itemsize > 2)
    with torch.no_grad():
        assert torch.equal(case.loss(*given), value)
    found = torch.autograd.grad(value * -2.5, given)
    off(monkeypatch)
    usual = case.loss(*given)
    assert not is_at_once(usual)
    assert (value.dtype, value.shape) == (usual.dtype, usual.shape)
    wide = [x.detach().double().requires_grad_() for x in given]
    truth = case.loss(*wide)
    # As near to the truth as the usual way is.
    unit = torch.finfo(value.dtype).eps
    assert error(value, truth) <= 4 * error(usual, truth) + 16 * unit * max(truth.abs().item(), 1)
    expected = torch.autograd.grad(usual * -2.5, given)
    for got, other, right in zip(found, expected, torch.autograd.grad(truth * -2.5, wide), strict=True):
        assert (got.dtype, got.shape) == (other.dtype, other.shape)
        slack = 64 * unit * max(right.norm().item(), 0.1)  # of rows near one another, coordinates near 1 cancel
        slack += 2**-7 * right.norm().item() * (dtype.itemsize == 2)
        assert error(got, right) <= 4 * error(other, right) + slack


@pytest.mark.parametrize("name", ["arcface", "arcface, many classes", "multi-similarity, two sets"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_against_a_parameter(name: str, dtype: torch.dtype) -> None:
    x, y = rows(name)
    x = x.detach().to(dtype).requires_grad_()
    value = CASES[name].loss(x, y)
    assert is_at_once(value)
    wide = [each.detach().double().requires_grad_() for each in (x, y)]
    truth = CASES[name].loss(*wide)
    assert error(value, truth) <= 1e-5 * truth.abs().item()
    found, expected = torch.autograd.grad(value, (x, y)), torch.autograd.grad(truth, wide)
    for got, right, leaf, rounding in zip(found, expected, (x, y), (torch.finfo(dtype).eps, 1e-5), strict=True):
        assert got.dtype == leaf.dtype
        assert error(got, right) <= rounding * right.norm().item()


@pytest.mark.parametrize("name", ["swav", "swav, crops"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swav_has_the_bits_of_the_usual_way(name: str, dtype: torch.dtype, monkeypatch) -> None:
    given = rows(name, dtype)
    value = CASES[name].loss(*given)
    found = torch.autograd.grad(value, given)
    off(monkeypatch)
    usual = CASES[name].loss(*given)
    assert torch.equal(value, usual)
    assert all(map(torch.equal, found, torch.autograd.grad(usual, given)))


@one_of_each
@pytest.mark.parametrize("strided", [False, True])
def test_a_gradient_is_made_where_it_is_needed(name: str, strided: bool) -> None:
    given = rows(name)
    if strided:
        given = [x.detach().T.contiguous().T.requires_grad_() for x in given]
    value = CASES[name].loss(*given)
    expected = torch.autograd.grad(value, given)
    for k, x in enumerate(given):
        others = [x if j == k else y.detach() for j, y in enumerate(given)]
        value = CASES[name].loss(*others)
        assert is_at_once(value)
        assert torch.equal(torch.autograd.grad(value, x)[0], expected[k])


@one_of_each
def test_gradients_belong_to_the_caller(name: str) -> None:
    """A second backward computes them again, so what the caller does to the first ones does not reach it."""
    given = rows(name)
    value = CASES[name].loss(*given)
    first = torch.autograd.grad(value, given, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    assert all(map(torch.equal, torch.autograd.grad(value, given, retain_graph=True), kept))
    for x in given:
        x.data = x.data.clone()  # read where it is then
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(value, given), kept))


@one_of_each
def test_changes_before_the_backward_are_noticed(name: str) -> None:
    given = [x * 1 for x in rows(name)]
    for k in range(len(given)):
        value = CASES[name].loss(*given)
        given[k].add_(1)
        with pytest.raises(RuntimeError, match="inplace"):
            value.backward()
    labels = LABELS.clone()
    for call in (lambda x, y: arcface_loss(x, labels, y), lambda x, y: multi_similarity_loss(x, labels)):
        value = call(*rows("arcface"))
        labels.clamp_(max=3)
        with pytest.raises(RuntimeError, match="inplace"):
            value.backward()


@one_of_each
def test_a_hook_on_saved_tensors_may_change_their_strides(name: str) -> None:
    given = rows(name)
    pack, unpack = (lambda t: t.detach().T.contiguous() if t.dim() == 2 else t), (lambda t: t.T if t.dim() == 2 else t)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        value = CASES[name].loss(*given)
    assert is_at_once(value)
    first = torch.autograd.grad(value, given, retain_graph=True)
    for got, again in zip(first, torch.autograd.grad(value, given), strict=True):
        torch.testing.assert_close(got, again)


@one_of_each
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(name: str, reentrant: bool) -> None:
    given = rows(name)
    expected = torch.autograd.grad(CASES[name].loss(*given), given)
    checkpoint(CASES[name].loss, *given, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip(given, expected, strict=True))


@one_of_each
def test_autocast_and_deterministic_mode_change_nothing(name: str) -> None:
    """The mode also fills new memory with NaN, so nothing is read that was not written."""
    given = rows(name)
    value = CASES[name].loss(*given)
    found = torch.autograd.grad(value, given)
    with torch.autocast("cpu", torch.bfloat16):
        inside = CASES[name].loss(*given)
        inner = torch.autograd.grad(inside, given)
    assert is_at_once(inside)
    assert torch.equal(inside, value)
    assert all(map(torch.equal, inner, found))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        inside = CASES[name].loss(*given)
        inner = torch.autograd.grad(inside, given)
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(inside, value)
    assert all(map(torch.equal, inner, found))


@one_of_each
@pytest.mark.parametrize("byte", [0xFF, 0x7F])  # NaN; 3e38 as float32
def test_nothing_is_read_from_a_workspace_that_was_not_written(name: str, byte: int, monkeypatch) -> None:
    given = rows(name)
    value = CASES[name].loss(*given)
    found = torch.autograd.grad(value, given)

    def filled(call) -> None:
        workspace = torch.full((call.workspace,), byte, dtype=torch.uint8)
        call.run(workspace.data_ptr())

    monkeypatch.setattr(native, "run", filled)
    again = CASES[name].loss(*given)
    assert torch.equal(again, value)
    assert all(map(torch.equal, torch.autograd.grad(again, given), found))


@one_of_each
def test_second_derivatives(name: str) -> None:
    given, case = rows(name, torch.float64), CASES[name]
    if case.further:
        assert torch.autograd.gradgradcheck(case.loss, given)
        return
    found = torch.autograd.grad(case.loss(*given), given, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        found[0].sum().backward()


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_one_tensor_given_twice(name: str, monkeypatch) -> None:
    (x, _), loss = rows(name, torch.float64), CASES[name].loss

    def both(x: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(loss(x, x + 0 * x.sum()), x, create_graph=True)
        (again,) = torch.autograd.grad(loss(x, x), x, create_graph=True)
        return [first, again, torch.autograd.grad((again * again.detach().cos()).sum(), x)[0]]

    found = both(x)
    off(monkeypatch)
    for got, expected in zip(found, both(x), strict=True):
        torch.testing.assert_close(got, expected)


@one_of_each
def test_inference_mode_leaves_nothing_behind(name: str, monkeypatch) -> None:
    """What is made once for all calls may be made there."""
    for cached in (small.constant, small.places, small_prototypes._shares, small_prototypes._inverses):
        cached.cache_clear()
    given = [x.detach() for x in rows(name)]
    with torch.inference_mode():
        expected = CASES[name].loss(*given)
    given = [x.requires_grad_() for x in given]
    value = CASES[name].loss(*given)
    value.backward()
    assert torch.equal(value, expected)


@one_of_each
def test_unusual_tensors_take_the_usual_way(name: str, monkeypatch) -> None:
    class Rows(Tensor):
        pass

    given, loss = rows(name), CASES[name].loss
    value = loss(*given)
    negated = [torch.complex(torch.zeros_like(x), -x).detach().conj().imag.requires_grad_() for x in given]
    for unusual in ([x.detach().as_subclass(Rows).requires_grad_() for x in given], negated):
        other = loss(*unusual)
        assert not is_at_once(other)
        torch.testing.assert_close(torch.as_tensor(other), value)
    with torch.inference_mode():
        inference = [x.clone() for x in given]
    monkeypatch.setattr(at_once, "_without_autocast", None)  # no call reaches it
    with torch.no_grad():
        torch.testing.assert_close(loss(*inference), value.detach())
    if name in ("vicreg", "barlow", "koleo", "hypersphere"):
        assert loss(*(x.to("meta") for x in given)).is_meta
    if CASES[name].engine:
        with fastcl.use_backend("chunked"):
            torch.testing.assert_close(loss(*given), value)


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_transforms_take_the_usual_way(name: str, monkeypatch) -> None:
    """It refuses those that it does not support."""
    given, loss = [x.detach() for x in rows(name)], CASES[name].loss
    value = loss(*given)
    monkeypatch.setattr(at_once, "_without_autocast", None)  # no call reaches it
    torch.testing.assert_close(torch.func.vmap(loss)(*(x.expand(2, N, D) for x in given)), value.expand(2))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(loss)(*given)


USUAL = {
    "koleo, another norm": lambda x, y: koleo_loss(x, p=3.0),
    "koleo, terms": lambda x, y: koleo_loss(x, reduction="none").sum(),
    "koleo, an integer": lambda x, y: koleo_loss(x, eps=1),
    "hypersphere, alpha": lambda x, y: hypersphere_loss(x, y, alpha=1.0),
    "hypersphere, dtypes": lambda x, y: hypersphere_loss(x, y.double()),
    "hypersphere, t": lambda x, y: hypersphere_loss(x, y, t=1e26),
    "arcface, terms": lambda x, y: arcface_loss(x, LABELS, y, reduction="none").sum(),
    "arcface, unsigned": lambda x, y: arcface_loss(x, LABELS.to(torch.uint64), y),
    "arcface, no angle": lambda x, y: arcface_loss(x, LABELS, y * torch.tensor([[0.0], *[[1.0]] * (N - 1)])),
    "multi-similarity, ids": lambda x, y: multi_similarity_loss(
        x, LABELS, y, LABELS, ids=torch.arange(N), contrast_ids=torch.arange(N)
    ),
    "multi-similarity, terms": lambda x, y: multi_similarity_loss(x, LABELS, reduction="none").sum(),
    "vicreg, weights": lambda x, y: vicreg_loss(x, y, nu_param=1e26),
    "vicreg, dtypes": lambda x, y: vicreg_loss(x, y.double()),
    "barlow, an integer": lambda x, y: barlow_twins_loss(x, y, scale=1),
    "swav, prior": lambda x, y: swav(x, y, prior=fastcl.power_law_prior),
    "swav, no iterations": lambda x, y: swav(x, y, n_iters=0),
    "swav, queue": lambda x, y: fastcl.SwAVLoss()([x, y], (), [x.detach(), y.detach()]),
    "swav, dtypes": lambda x, y: swav(x, y.double()),
    "rows of zeros": lambda x, y: koleo_loss(x * torch.tensor([[0.0], *[[1.0]] * (N - 1)])),
    "large rows": lambda x, y: hypersphere_loss(x * 1e25, y),
    "tiny rows": lambda x, y: hypersphere_loss(x * 1e-25, y),
}


@pytest.mark.parametrize("name", USUAL)
def test_unusual_calls_take_the_usual_way(name: str, monkeypatch) -> None:
    monkeypatch.setattr(at_once, "_without_autocast", None)  # no call reaches it
    given = rows("vicreg")
    value = USUAL[name](*given)
    assert value.isfinite()
    assert not is_at_once(value)
    value.backward()
    assert given[0].grad is not None


@one_of_each
def test_sizes(name: str, monkeypatch) -> None:
    """From a limit on the usual way takes over."""
    given, loss = rows(name), CASES[name].loss
    if name == "swav":
        monkeypatch.setattr(small_prototypes, "FEW", N * D)
        assert is_at_once(loss(*given))
        monkeypatch.setattr(small_prototypes, "FEW", N * D - 1)
    else:
        products = N * D * (C if name == "arcface" else D if name in ("vicreg", "barlow") else N)
        for module in (at_once, small):
            monkeypatch.setattr(module, "MOST", products)
        assert is_at_once(loss(*given))
        for module in (at_once, small):
            monkeypatch.setattr(module, "MOST", products - 1)
    assert not is_at_once(loss(*given))


x = torch.randn(N, D, generator=generator(0))
REFUSED = {
    "labels": (lambda: arcface_loss(x, LABELS, x[:3]), "labels: expected numbers from 0 to 2, got 4"),
    "negative labels": (lambda: arcface_loss(x, LONERS, x), "labels: expected numbers from 0 to 11, got -2"),
    "margin": (lambda: arcface_loss(x, LABELS, x, margin=181.0), "margin: expected degrees from 0 to 180"),
    "one label": (lambda: multi_similarity_loss(x, LABELS[:1]), r"labels: expected shape \[12\], got \[1\]"),
    "contrasts": (lambda: multi_similarity_loss(x, LABELS, x), "contrast_labels: expected a tensor"),
    "dimensions": (
        lambda: multi_similarity_loss(x, LABELS, x[:, :3], LABELS), "contrasts: expected rows of dimension 7"
    ),
    "reduction": (lambda: koleo_loss(x, reduction="max"), "reduction: expected one of"),
    "flag": (lambda: vicreg_loss(x, x, gather=0), "gather: expected True or False, got 0"),
    "eps": (lambda: vicreg_loss(x, x, eps=0.0), "eps: expected a positive number"),
    "scale": (lambda: barlow_twins_loss(x, x, scale=torch.inf), "scale: expected a finite number"),
    "rows": (lambda: hypersphere_loss(x, x[:3]), "z_b: expected shape"),
    "t": (lambda: hypersphere_loss(x, x, t=0.0), "t: expected a positive number"),
    "crops": (lambda: swav(x), "high_resolution: expected at least one crop"),
    "crop": (lambda: swav(x, x[:3]), r"high_resolution\[1\]: expected shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_those_of_the_usual_way(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@one_of_each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_never_hidden(name: str, bad: float) -> None:
    given = [x.detach() for x in rows(name)]
    given[-1][0, 0] = bad
    assert not CASES[name].loss(*given).isfinite() or (name == "swav" and bad == -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("want", [("lse_all",), ("lse_neg",), ("lse_pos", "lse_neg"), ("lse_all", "lse_pos")])
@pytest.mark.parametrize("normalize", [False, True])
def test_log_sums_are_the_statistics(want, two: bool, normalize: bool, dtype: torch.dtype) -> None:
    """To the bit."""
    a, b = (torch.randn(n, D, generator=generator(n)).to(dtype).requires_grad_() for n in (N, 9))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    own, other, scales = LABELS, LABELS[:9] - 1, torch.tensor([-2.0, 5.0, 0.5], dtype=real)
    leaves = (a, b) if two else (a,)
    stats = contrastive_stats(
        a, b if two else None, own, other if two else None, logit_scale=scales, normalize_anchors=normalize,
        normalize_contrasts=normalize and two, want=want,
    )  # fmt: skip
    expected = torch.stack([getattr(stats, name) for name in want])
    sums = LogSums(a.detach(), b.detach() if two else None, own, other if two else None, scales, normalize, want)
    assert torch.equal(sums.fields, expected)
    finite = expected.isfinite()
    of_fields = torch.randn(expected.shape, generator=generator(3), dtype=real) * finite
    gradients = torch.autograd.grad((torch.where(finite, expected, 0) * of_fields).sum(), leaves)
    for got, right in zip(sums.gradients(of_fields, (True, two)), gradients, strict=False):
        assert torch.equal(got.to(right.dtype), right)
    assert sums.gradients(of_fields, (False, False)) == [None, None]


@pytest.mark.parametrize("n", [2, 3, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_nearest_other_row(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, D, generator=generator(n), dtype=dtype)
    x[0] = x[-1]
    own = torch.arange(n)
    expected = fastcl.topk_similarity(x, x, 1, query_ids=own, key_ids=own)[1][:, 0]
    assert torch.equal(nearest_other(x), expected)


@pytest.mark.parametrize("shape", [(small.MOST_ROWS + 1, 4), (4, small.MOST_ROWS + 1)])
def test_scores_that_sinkhorn_does_not_take_at_once(shape: tuple[int, int]) -> None:
    scores = [torch.randn(shape, generator=generator(k)).requires_grad_() for k in range(2)]
    loss = fastcl.SwAVLoss()(scores)
    loss.backward()
    assert loss.isfinite()
    assert scores[0].grad is not None


def test_arcface_without_prototypes_names_them() -> None:
    with pytest.raises(TypeError, match="prototypes: expected a tensor, got NoneType"):
        fastcl.functional.arcface_loss(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), None)


def test_opposite_rows_have_finite_gradients() -> None:
    """All potentials are near the smallest number, and the factor of their gradient is large."""
    rows = torch.tensor([[1.0, 0, 0], [-1, 0, 0]], requires_grad=True)
    fastcl.functional.hypersphere_loss(rows, rows.detach(), t=20.0, lam=1e3).backward()
    torch.testing.assert_close(rows.grad, torch.zeros(2, 3))
