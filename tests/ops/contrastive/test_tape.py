"""The mean loss replayed from a tape: the same bits as without one, in Triton's interpreter."""

import ctypes
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.ops.backends import triton_recorder, triton_tape
from fastcl.ops.backends.triton_tape import Tape, Taped
from fastcl.ops.contrastive import direct, replayed
from tests.ops.contrastive.test_direct import KINDS, case
from tests.support.backends import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted here")


Tapeds = tuple[Taped, ...]


@pytest.fixture(autouse=True)
def tapes(monkeypatch) -> Iterator[tuple[Tapeds, Tapeds]]:
    """New tapes of forwards and backwards, which are used on backend `triton`: from the caller's tensors, and from the
    operator's arguments."""
    forwards = Taped(replayed._forward, own=1), Taped(direct.mean_forward, own=2)
    backwards = Taped(replayed._backward, own=5), Taped(direct.mean_backward, own=8)
    for module, names, k in ((replayed, ("FORWARD", "BACKWARD"), 0), (direct, ("_FORWARD", "_BACKWARD"), 1)):
        monkeypatch.setattr(module, names[0], forwards[k])
        monkeypatch.setattr(module, names[1], backwards[k])
    monkeypatch.setattr(direct, "TAPED", "cpu")
    with fastcl.use_backend("triton"):
        yield forwards, backwards


def recorded(tapeds: Tapeds) -> list[bool]:
    return [isinstance(tape, Tape) for taped in tapeds for tape in taped._tapes.values()]


def outputs(taped: Taped, options: object, *inputs: Tensor) -> list[Tensor | None]:
    found, tape = taped(options, (), 0, *inputs)
    return [*found] if tape is None else [*found[: taped._own], *tape.outputs(found[taped._own :])]


def gradients(leaves: list[Tensor], options: dict[str, object], factor: float = -3.5) -> list[Tensor]:
    loss = cluster_infonce(leaves[0], **options)
    return [loss.detach(), *torch.autograd.grad(loss * factor, leaves)]


@pytest.mark.parametrize(
    ("kind", "denominator"), [*((kind, "all") for kind in KINDS), ("self", "negatives"), ("symmetric", "negatives")]
)
def test_replays_give_the_same_bits(kind: str, denominator: str, tapes, monkeypatch) -> None:
    leaves, options = case(kind, torch.float32)
    options["denominator"] = denominator
    for call in range(4):  # as it is, recorded, replayed, replayed
        with torch.no_grad():
            for leaf in leaves:
                leaf.add_(0.1 * torch.randn_like(leaf)) if leaf.dim() else leaf.mul_(1.1)
        got = gradients(leaves, options)
        monkeypatch.setattr(direct, "TAPED", "none")
        expected = gradients(leaves, options)
        monkeypatch.setattr(direct, "TAPED", "cpu")
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), call
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    assert recorded(tapes[0]) == recorded(tapes[1]) == [True]  # so nothing reads a value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts_have_tapes_of_their_own(dtype, tapes) -> None:
    plain = torch.randn(12, 2, 5)
    layouts = [
        plain,
        plain.to(dtype),
        plain.transpose(0, 1).contiguous().transpose(0, 1),  # is copied
        torch.cat((torch.zeros(1), plain.flatten()))[1:].view_as(plain),  # at an address of its own kind
        plain[:8],
    ]
    for _ in range(3):
        for layout in layouts:
            leaf = layout.detach().requires_grad_()
            loss, grad = gradients([leaf], {"temperature": 0.3})
            direct_loss, direct_grad = _without_tape(leaf)
            assert torch.equal(loss, direct_loss)
            assert torch.equal(grad, direct_grad)
    assert recorded(tapes[0]) == [True] * 5


def _without_tape(leaf: Tensor) -> list[Tensor]:
    before, direct.TAPED = direct.TAPED, "none"
    try:
        return gradients([leaf], {"temperature": 0.3})
    finally:
        direct.TAPED = before


def test_the_precision_of_products_is_part_of_the_kind(tapes) -> None:
    leaf = torch.randn(12, 2, 40).requires_grad_()
    before = torch.get_float32_matmul_precision()
    losses = {}
    try:
        for precision in ("highest", "high") * 3:
            torch.set_float32_matmul_precision(precision)
            losses.setdefault(precision, []).append(gradients([leaf], {"temperature": 0.3})[0])
    finally:
        torch.set_float32_matmul_precision(before)
    for found in losses.values():
        assert all(torch.equal(a, b) for a, b in pairwise(found))
    assert not torch.equal(losses["highest"][0], losses["high"][0])
    assert recorded(tapes[0]) == [True, True]


def test_each_replay_has_memory_of_its_own() -> None:
    """Several forwards before their backwards, a backward twice, and results that outlive the next replay."""
    leaves = [torch.randn(10, 2, 6).requires_grad_() for _ in range(3)]
    expected = [_without_tape(leaf)[1] for leaf in leaves]
    for _ in range(3):
        losses = [cluster_infonce(leaf, temperature=0.3) * -3.5 for leaf in leaves]
        found = [
            torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss, leaf in zip(losses, leaves, strict=True)
        ]
        again = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
        for a, b, c in zip(found, again, expected, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, c)


def test_second_derivatives_and_changed_inputs_are_errors_after_replays_too() -> None:
    leaf = torch.randn(8, 2, 5).requires_grad_()
    for _ in range(3):
        gradients([leaf], {"temperature": 0.3})
    (grad,) = torch.autograd.grad(cluster_infonce(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.sum().backward()
    loss = cluster_infonce(leaf)
    with torch.no_grad():
        leaf.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tracers_do_not_meet_tapes(tapes) -> None:
    leaf = torch.randn(8, 2, 5).requires_grad_()
    (expected,) = torch.autograd.grad(cluster_infonce(leaf), leaf)
    with torch.device("cpu"):  # a mode
        for _ in range(3):
            (found,) = torch.autograd.grad(cluster_infonce(leaf), leaf)
            torch.testing.assert_close(found, expected)
    assert recorded(tapes[0]) == [False]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_begins_at_the_callers_tensors(kind: str, tapes) -> None:
    leaves, options = case(kind, torch.float32)
    for _ in range(3):
        gradients(leaves, options)
    assert [len(taped._tapes) for taped in (*tapes[0], *tapes[1])] == [1, 0, 1, 0]


def test_clip_loss_and_calls_without_gradients(tapes) -> None:
    image, text = (torch.randn(9, 5).requires_grad_() for _ in range(2))
    scale, loss = torch.tensor(7.0, requires_grad=True), fastcl.ClipLoss()
    found = [torch.autograd.grad(loss(image, text, scale), (image, text, scale)) for _ in range(4)]
    direct.TAPED = "none"
    expected = torch.autograd.grad(loss(image, text, scale), (image, text, scale))
    direct.TAPED = "cpu"
    for each in found:
        assert all(torch.equal(a, b) for a, b in zip(each, expected, strict=True))
    with torch.no_grad():
        values = [loss(image, text, 7.0) for _ in range(4)]
    assert len({value.item() for value in values}) == 1
    assert not values[-1].requires_grad
    assert recorded(tapes[0]) == [True, True]


@pytest.mark.parametrize("sees", [True, False])
def test_checkpoints_save_the_same_tensors_each_time(sees, monkeypatch) -> None:
    """The first forward of a kind, its repetition in the backward, and so on: not all of them would be replayed."""
    if not sees:  # as before torch 2.8
        monkeypatch.setattr(triton_tape, "_top_hooks", None)
        for module in (triton_tape, replayed, direct):
            monkeypatch.setattr(module, "SEES_HOOKS", False)
    leaf = torch.randn(10, 2, 6).requires_grad_()
    expected = _without_tape(leaf)[1]
    for _ in range(4):
        loss = checkpoint(lambda: cluster_infonce(leaf, temperature=0.3) * -3.5, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    for _ in range(4):
        loss = cluster_infonce(leaf, temperature=0.3) * -3.5
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


@pytest.mark.parametrize(
    ("sizes", "few"),
    [((64, 64, 128), True), ((16384, 16384, 128), True), ((16385, 16385, 128), False), ((256, 65536, 128), True),
     ((4096, 65536, 128), False), ((64, 1 << 18, 128), False)],
)  # fmt: skip
def test_which_sizes_are_replayed(sizes: tuple[int, int, int], few: bool) -> None:
    assert direct.few(*sizes) == few


WRONG = {
    "clusters: expected shape": {"clusters": torch.zeros(3, dtype=torch.int64)},
    "clusters: expected integers": {"clusters": torch.zeros(10)},
    "clusters: expected a tensor": {"clusters": [0] * 10},
    "contrasts: expected rows of dimension": {"contrasts": torch.randn(20, 3)},
    "symmetric: expected False": {"symmetric": True},
    "ids: expected a tensor": {"contrasts": torch.randn(20, 6), "contrast_ids": torch.arange(20)},
    "temperature: expected a positive number": {"temperature": -1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_are_those_of_other_calls(message: str) -> None:
    leaf = torch.randn(10, 2, 6).requires_grad_()
    gradients([leaf], {"temperature": 0.3})
    for _ in range(3):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            cluster_infonce(leaf, **WRONG[message])


def test_constants_are_used_on_other_streams_once_they_are_there(tapes, monkeypatch) -> None:
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    class Event:
        there = False

        def query(self) -> bool:
            return self.there

    leaf = torch.randn(10, 2, 6).requires_grad_()
    for _ in range(3):
        gradients([leaf], {"temperature": 0.3})
    (tape,) = tapes[0][0]._tapes.values()
    assert tape.ready(0)
    tape._constants_there = event = Event()
    assert tape.ready(tape._stream)
    assert not tape.ready(17)
    event.there = True
    assert not tape.ready(17)  # no event may be asked then
    capturing = False
    assert tape.ready(17)
    assert tape._constants_there is None


# Functions that a tape cannot repeat


def test_a_function_that_reads_a_value_is_called_each_time() -> None:
    calls = []

    def doubled_unless_zero(_, x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (x * 2 if x.any().item() else x + 1,)

    taped = Taped(doubled_unless_zero, own=1)
    for value in (1.0, 2.0, 3.0, 0.0):
        (found,) = outputs(taped, (), torch.full((3,), value))
        assert torch.equal(found, torch.full((3,), 2 * value or 1))
    assert len(calls) == 4
    assert recorded((taped,)) == [False]


def test_a_function_that_returns_its_input_is_called_each_time() -> None:
    taped = Taped(lambda _, x: (x,), own=1)
    for _ in range(4):
        x = torch.randn(3)
        assert outputs(taped, (), x)[0] is x
    assert recorded((taped,)) == [False]


def test_operators_views_and_memory() -> None:
    def work(_, x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        out, scratch = torch.empty_like(x), torch.empty(2, x.numel())
        scratch[0] = x.flatten() * 2
        scratch[1].copy_(y.flatten().flip(0))
        torch.add(scratch[0].view_as(x), scratch[1].view_as(x), out=out)
        largest, places = scratch.max(1)
        others = x.sum([0], dtype=torch.float64), x.clamp(min=0.25), torch.cat([x, out]).clamp(0.1, 0.9)
        return out, None, largest[1:], places, scratch[1], x.sum(), scratch.view(torch.int32)[0, :2], *others

    taped = Taped(work, own=1)
    kept = []
    for _ in range(5):
        x, y = torch.randn(3, 4), torch.randn(4, 3).T
        got, expected = outputs(taped, "kind", x, y), work("kind", x, y)
        kept.append((got, expected))
        same = torch.randn(3, 4)
        kept.append((outputs(taped, "other", same, same), work("other", same, same)))
    for got, expected in kept:
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and a.stride() == b.stride())
    assert recorded((taped,)) == [True, True]


def test_a_tape_keeps_no_tensor_alive() -> None:
    alive = []

    def work(_, x: Tensor) -> tuple[Tensor]:
        scratch = torch.empty_like(x)
        torch.cat([x, x.exp()], out=torch.empty(2 * len(x)))
        scratch.copy_(x)
        alive.extend(weakref.ref(tensor) for tensor in (x, scratch))
        return (scratch * 2,)

    taped = Taped(work, own=1)
    for _ in range(3):
        assert torch.equal(outputs(taped, (), torch.ones(3))[0], torch.full((3,), 2.0))
    gc.collect()
    assert recorded((taped,)) == [True]
    assert len(alive) == 4
    assert not any(reference() is not None for reference in alive)


def test_a_backward_runs_on_the_backend_of_its_forward(tapes) -> None:
    """Whichever is chosen when it runs, or in whichever thread."""
    leaves, options = case("clusters", torch.float32)

    def elsewhere(loss: Tensor) -> list[Tensor]:
        with fastcl.use_backend("reference"):
            return list(torch.autograd.grad(loss, leaves))

    def in_a_thread(loss: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(1) as pool:  # where no backend is chosen
            return list(pool.submit(torch.autograd.grad, loss, leaves).result())

    expected = gradients(leaves, options, 1.0)[1:]
    for call in range(5):
        for backward in (elsewhere, in_a_thread):
            got = backward(cluster_infonce(leaves[0], **options))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), call


def test_a_tensor_in_two_places_has_a_tape_of_its_own(tapes) -> None:
    x, y, scale = torch.randn(6, 5), torch.randn(6, 5), torch.tensor(3.0)
    loss = fastcl.ClipLoss()
    with torch.no_grad():
        for _ in range(3):
            loss(x, x, scale)
        assert torch.equal(loss(x, y, scale), expected_of(loss, x, y, scale))
        clusters, others = torch.arange(6) // 2, torch.arange(6) % 2
        for other in (clusters, clusters, clusters, others, others, others):
            options = {"contrasts": y, "clusters": clusters, "contrast_clusters": other}
            got = cluster_infonce(x, **options)
            assert torch.equal(got, expected_of(cluster_infonce, x, **options))


def expected_of(function, *arguments, **options) -> Tensor:
    """Without a tape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "TAPED", "none")
        return function(*arguments, **options)


def test_addresses_belong_to_the_tensor_that_they_lie_in() -> None:
    """Halves of one tensor lie in one storage, and a view may end where its storage does."""
    pair = torch.arange(8.0)
    read: list[tuple[float, float]] = []

    def work(first: int, second: int) -> None:
        read.append(tuple(ctypes.c_float.from_address(place).value for place in (first, second)))

    def function(_: object, a: Tensor, b: Tensor) -> tuple[Tensor]:
        work(a.data_ptr(), b.data_ptr())
        if (found := triton_recorder.recorder()) is not None:
            found.called(work, (a.data_ptr(), b.data_ptr()))
        return (a + b,)

    taped = Taped(function, own=1)
    for _ in range(3):
        outputs(taped, "halves", *pair.chunk(2))
    outputs(taped, "halves", torch.full((4,), 5.0), torch.full((4,), 6.0))
    assert read == [(0, 4)] * 3 + [(5, 6)]
    assert recorded((taped,)) == [True]
    with triton_recorder.recording([pair[6:]]) as found:
        found.called(work, (pair[6:].data_ptr() + 8,))
    assert found.failed  # the end of the storage
    with triton_recorder.recording([pair, pair[2:]]) as found:
        found.called(work, (pair[3:].data_ptr(),))
    assert found.failed  # in both


def test_kinds_that_came_once_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(triton_tape, "MOST_TAPES", 4)
    taped = Taped(lambda _, x: (x * 2,), own=1)
    for size in range(1, 9):
        outputs(taped, "", torch.ones(size))
    for _ in range(3):
        outputs(taped, "", torch.ones(20))
    assert recorded((taped,)).count(True) == 1
