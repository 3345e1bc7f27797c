"""What every loss on class vectors, neighbours, views and prototypes promises beside its formula."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastcl
from tests.support.strategies import generator

N, D, C = 12, 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3])
VIEW, PROTOTYPES = (torch.randn(n, D, generator=generator(1)).bfloat16().float() for n in (N, C))  # in all dtypes
QUEUE = nn.functional.normalize(PROTOTYPES, dim=1).bfloat16().float()
CONCENTRATIONS = torch.tensor([0.1, 0.2, 0.4, 0.3, 0.5])
NEGATIVES = torch.tensor([4])
Call = Callable[[nn.Module, Tensor], Tensor]


def with_labels(loss: nn.Module, x: Tensor) -> Tensor:
    return loss(x, LABELS[: len(x)])


def with_a_view(loss: nn.Module, x: Tensor) -> Tensor:
    return loss(x, VIEW[: len(x)].to(x))


def with_prototypes(loss: nn.Module, x: Tensor) -> Tensor:
    return loss(x, LABELS[: len(x)], PROTOTYPES.to(x), CONCENTRATIONS, negatives=NEGATIVES)


def with_a_queue(loss: nn.Module, x: Tensor) -> Tensor:
    return loss(x, VIEW[: len(x)].to(x), QUEUE.to(x))


LOSSES: dict[str, tuple[Callable[..., nn.Module], Call]] = {
    "arcface": (lambda: fastcl.ArcFaceLoss(C, D), with_labels),
    "cosface": (lambda: fastcl.CosFaceLoss(C, D), with_labels),
    "proxy_anchor": (lambda: fastcl.ProxyAnchorLoss(C, D), with_labels),
    "multi_similarity": (fastcl.MultiSimilarityLoss, with_labels),
    "koleo": (fastcl.KoLeoLoss, lambda loss, x: loss(x)),
    "ldreg": (lambda: fastcl.LDRegLoss(4), lambda loss, x: loss(x)),
    "hypersphere": (fastcl.HypersphereLoss, with_a_view),
    "dclw": (fastcl.DCLWLoss, with_a_view),
    "proto_nce": (lambda: fastcl.ProtoNCELoss(1), with_prototypes),
    "ascl": (lambda: fastcl.ASCLLoss(neighbors=2), with_a_queue),
}
each = pytest.mark.parametrize("name", list(LOSSES))


def made(name: str) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    make, call = LOSSES[name]
    return make(), call


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, D, generator=generator(0)).to(dtype).requires_grad_()


@each
def test_a_number_that_is_none_is_never_hidden(name: str, backend: str) -> None:
    loss, call = made(name)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = rows().detach()
        x[3, 2] = bad
        assert not call(loss, x).isfinite()


@each
def test_no_rows(name: str, backend: str) -> None:
    loss, call = made(name)
    x = rows()[:0].detach().requires_grad_()
    value = call(loss, x)
    assert value.item() == 0
    value.backward()
    assert x.grad.shape == (0, D)
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


@each
def test_a_single_row(name: str) -> None:
    loss, call = made(name)
    x = rows()[:1].detach().requires_grad_()
    value = call(loss, x)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    if name in ("multi_similarity", "koleo", "ldreg", "dclw"):  # which need another row
        assert value.item() == 0
        assert not x.grad.any()


@each
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30, 1e30])
def test_rows_that_are_all_alike(name: str, fill: float) -> None:
    loss, call = made(name)
    x = torch.full((N, D), fill).requires_grad_()
    value = call(loss, x)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    if fill == 0:
        assert not x.grad.any()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Also of a module that was cast."""
    loss, call = made(name)
    x = rows(dtype)
    value = call(copy.deepcopy(loss).to(dtype), x)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.dtype == dtype
    wide = call(copy.deepcopy(loss).to(dtype).double(), x.double())
    torch.testing.assert_close(value.double(), wide, rtol=1e-5, atol=1e-6)


@each
def test_autocast_changes_nothing(name: str) -> None:
    loss, call = made(name)
    x = rows()
    leaves = [x, *loss.parameters()]
    value = call(loss, x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(loss, x)
        gradients = torch.autograd.grad(inside, leaves)
    assert torch.equal(inside, value)
    assert all(map(torch.equal, gradients, torch.autograd.grad(value, leaves)))


@each
def test_compiles_without_a_break(name: str) -> None:
    loss, call = made(name)
    x = rows()
    leaves = [x, *loss.parameters()]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    value, expected = compiled(loss, x), call(loss, x)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


def test_a_draw_compiles() -> None:
    loss = torch.compile(fastcl.ProtoNCELoss(2), fullgraph=True, dynamic=True, backend="aot_eager")
    assert loss(rows(), LABELS, PROTOTYPES, CONCENTRATIONS).isfinite()


@each
def test_repeats_to_the_bit(name: str) -> None:
    loss, call = made(name)
    x = rows()
    leaves = [x, *loss.parameters()]
    first, second = (torch.autograd.grad(call(loss, x), leaves) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["arcface", "koleo", "proto_nce"])
def test_gathered_rows_repeat_to_the_bit(name: str) -> None:
    """Sizes at which several threads add to the gradient of one row."""
    x = torch.randn(6000, 16, generator=generator(0)).requires_grad_()
    w = torch.randn(40, 16, generator=generator(1)).requires_grad_()
    labels = torch.randint(0, 40, (6000,), generator=generator(2))
    calls = {
        "arcface": lambda: fastcl.functional.arcface_loss(x, labels, w),
        "koleo": lambda: fastcl.functional.koleo_loss(torch.cat((w, x))),
        "proto_nce": lambda: fastcl.ProtoNCELoss(7)(x, labels, w, w.new_ones(40), negatives=torch.arange(7)),
    }
    first, second = (torch.autograd.grad(calls[name](), [x, w]) for _ in range(2))
    assert all(map(torch.equal, first, second))


@each
def test_strides_and_expanded_gradients(name: str) -> None:
    loss, call = made(name)
    x = rows()
    expected = torch.autograd.grad(call(loss, x), x)[0]
    wide = torch.zeros(D, 2 * N)
    wide[:, ::2] = x.detach().T
    leaf = wide.requires_grad_()
    call(loss, leaf[:, ::2].T).expand(3).sum().backward()
    torch.testing.assert_close(leaf.grad[:, ::2].T, 3 * expected)


@each
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    loss, call = made(name)
    x = rows(torch.float64)
    (first,) = torch.autograd.grad(call(loss.double(), x), x, create_graph=True)
    if name == "koleo":  # plain PyTorch but for the search
        assert torch.autograd.gradcheck(lambda x: torch.autograd.grad(call(loss, x), x, create_graph=True)[0], x)
        return
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        first.sum().backward()


@each
@pytest.mark.parametrize("how", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["copy", "pickle"])
def test_modules_can_be_copied_and_pickled(name: str, how) -> None:
    loss, call = made(name)
    other = how(loss)
    assert repr(other) == repr(loss)
    assert torch.equal(call(other, rows()), call(loss, rows()))
    state = loss.state_dict()
    other.load_state_dict({key: value + 1 for key, value in state.items()})
    assert all(torch.equal(value + 1, other.state_dict()[key]) for key, value in state.items())


@each
def test_shapes_on_meta(name: str) -> None:
    if name in ("hypersphere", "dclw", "ascl"):
        x = torch.empty(N, D, device="meta")
        value = LOSSES[name][0]()(*[x] * (3 if name == "ascl" else 2))
    else:
        loss, x = LOSSES[name][0]().to("meta"), torch.empty(N, D, device="meta")
        options = {"negatives": NEGATIVES.to("meta")} if name == "proto_nce" else {}
        more = {"koleo": (), "ldreg": (), "proto_nce": (LABELS, PROTOTYPES, CONCENTRATIONS)}.get(name, (LABELS,))
        value = loss(x, *(tensor.to("meta") for tensor in more), **options)
    assert value.is_meta
    assert value.shape == ()
