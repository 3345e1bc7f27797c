"""The operator of soft assignments: registration, compilation, backends, memory, threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.ops.backends import choose, native
from fastcl.ops.contrastive.records import Needs, gradient_places
from fastcl.ops.soft import assignments as soft_assignments
from fastcl.ops.soft import cpu as soft_cpu
from tests.losses.test_cluster_assignments import check_loss, library, objective, problem
from tests.ops.test_library import allocated
from tests.support.backends import BACKENDS, ENGINES, running
from tests.support.oracle import differentiate
from tests.support.strategies import generator

FORWARD = torch.ops.fastcl.soft_stats_fwd.default
BACKWARD = torch.ops.fastcl.soft_stats_bwd.default

# The operator


def operator_arguments(case: str, backend: str, dtype: torch.dtype, grad: bool) -> tuple[Any, ...]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = generator(3)
    arguments: dict[str, Any] = {
        **{argument.name: None for argument in FORWARD._schema.arguments},
        "anchor_values": torch.randn(5, 3, generator=g).to(dtype),
        "anchor_assignments": torch.rand(5, 4, generator=g).to(dtype),
        "logit_scale": torch.tensor([2.0], dtype=wide),
        "anchor_normalize": False,
        "contrast_normalize": False,
        "want": ["lse_all", "sum_pos"],
        "both": False,
        "anchors_only": False,
        "observe": False,
    }
    if case == "everything":
        arguments |= {
            "contrast_values": torch.randn(7, 3, generator=g).to(dtype),
            "contrast_assignments": torch.rand(7, 4, generator=g),
            "contrast_bias": torch.rand(7, generator=g).to(wide),
            "anchor_ids": torch.tensor([0, 1, 2, 3, -1]),
            "contrast_ids": torch.tensor([0, -1, -1, 2, -1, 1, 5]),
            "anchor_normalize": True,
            "contrast_normalize": True,
            "both": True,
        }
    if grad:
        for value in arguments.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_()
    arguments["backend"] = backend
    return tuple(arguments[argument.name] for argument in FORWARD._schema.arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["required", "everything"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(case, dtype, backend) -> None:
    with fastcl.use_backend(backend):
        name = choose.choose_backend(torch.device("cpu"), dtype, "soft_assignments")
    for grad in (False, True):
        torch.library.opcheck(FORWARD, operator_arguments(case, name, dtype, grad))
    arguments = operator_arguments(case, name, dtype, False)
    outputs = FORWARD(*arguments)
    gradients = (torch.ones_like(outputs[0]), torch.ones_like(outputs[3]))
    for wanted in (Needs._fields, ("anchors", "logit_scale"), ("anchor_assignments",)):
        there = [arguments[place] is not None for place in gradient_places(arguments)]
        needs = [name in wanted and one for name, one in zip(Needs._fields, there, strict=True)]
        torch.library.opcheck(BACKWARD, (*arguments, *outputs, *gradients, needs))
    for output in (*outputs, *BACKWARD(*arguments, *outputs, *gradients, [True] * 7)):
        assert output.is_contiguous()


def test_compiles() -> None:
    arguments = problem(8, 3, 4, dtype=torch.float32)
    x, r = arguments["embeddings"].requires_grad_(), arguments["assignments"].requires_grad_()

    def step(x: Tensor, r: Tensor) -> Tensor:
        return cluster_infonce(x, assignments=r, weights=torch.ones(8))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(torch.autograd.grad(compiled(x, r), [x, r]), torch.autograd.grad(step(x, r), [x, r]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_backend_without_assignments_is_replaced_by_blocks() -> None:
    assert choose.choose_backend(torch.device("cpu"), torch.float64, "soft_assignments") in ("cpu", "chunked")
    with fastcl.use_backend("reference"):
        assert choose.choose_backend(torch.device("cpu"), torch.float32, "soft_assignments") == "reference"


def test_blocks_of_the_assignments_gradient(monkeypatch) -> None:
    """Its factors are computed for a block of rows at a time."""
    arguments = problem(23, 6, 4, m=19, ids=True, dtype=torch.float64, symmetric=True)
    leaves = ("assignments", "contrast_assignments")
    _, whole = differentiate(library, arguments, leaves, objective)
    monkeypatch.setattr(soft_assignments, "BLOCK", 24)
    _, cut = differentiate(library, arguments, leaves, objective)
    for name in leaves:
        torch.testing.assert_close(whole[name], cut[name])


def test_sample_ids_of_many_places(monkeypatch) -> None:
    """Products subtract the pairs of frequent ids, also if hardly any pair is left."""
    formed: list[Any] = []
    form = soft_assignments._Factor.at
    monkeypatch.setattr(
        soft_assignments._Factor, "at", lambda factor, index: formed.append(index) or form(factor, index)
    )
    few = soft_assignments.FEW
    for n in (few, few + 1, 12 * few):
        arguments = problem(n + 3, 6, 4, m=n + 5, ids=True, dtype=torch.float64, symmetric=True)
        arguments["ids"] = torch.tensor([0, -1, 1, *[2] * n])
        arguments["contrast_ids"] = torch.tensor([2] * n + [-1, 0, 0, 1, 3])
        formed.clear()
        check_loss(arguments, ("chunked",))
        assert len(formed) < 2 * 2 * (few + 10)


# Memory and determinism


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("chunked", "cpu")])
def test_no_weights_are_stored(backend) -> None:
    n = 4096
    x = torch.randn(n, 16, generator=generator(0)).requires_grad_()
    r = torch.rand(n, 8, generator=generator(1)).requires_grad_()
    with fastcl.use_backend(backend):
        largest, _ = allocated(lambda: cluster_infonce(x, assignments=r).backward())
    assert largest < n * n  # bytes; all weights would take four times that


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [0.1, 0.01])  # with one exponential for row and column, with running maxima
@pytest.mark.parametrize("m", [None, 430])
@pytest.mark.usefixtures("_threads_restored")
def test_any_number_of_threads_is_as_exact_and_one_number_gives_the_same_bits(engine, temperature, m) -> None:
    two = {} if m is None else {"symmetric": True, "bias": True, "ids": True, "reduction": "mean"}
    arguments = problem(m or 430, 24, 40, m=m, temperature=temperature, **two)
    leaves = ("embeddings", *(("contrasts", "contrast_bias") if two else ()))
    assert 5 * native.PRODUCTS <= 430 * 430 * (24 + 40)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        check_loss(arguments, (f"cpu-{engine}",))
        with running(f"cpu-{engine}"):
            found = [differentiate(library, arguments, leaves, objective) for _ in range(2)]
        (loss, gradients), (again, gradients_again) = found
        assert torch.equal(loss, again)
        for name in leaves:
            assert torch.equal(gradients[name], gradients_again[name])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("_threads_restored")
def test_statistics_of_two_sets_rows_do_not_depend_on_the_number_of_threads(engine) -> None:
    g = generator(0)
    x, y = torch.randn(430, 24, generator=g), torch.randn(410, 24, generator=g)
    r, q = torch.rand(430, 40, generator=g), torch.rand(410, 40, generator=g)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with running(f"cpu-{engine}"):
            s = fastcl.contrastive_stats(x, y, anchor_assignments=r, contrast_assignments=q)
        found.append((s.lse_all, s.sum_pos, s.num_pos))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


# Kept weights


KEPT = {
    "self-contrast": (33, None, {}),
    "bias": (33, None, {"contrast_bias": torch.linspace(-1, 1, 33)}),
    "two sets": (40, 29, {}),
    "both": (40, 29, {"symmetric": True}),
}


def soft_loss(case: str, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    n, m, options = KEPT[case]
    g = generator(11)
    x, r = torch.randn(n, 5, generator=g).to(dtype).requires_grad_(), torch.rand(n, c, generator=g).to(dtype)
    given = dict(options, assignments=r)
    leaves = [x]
    if m is not None:
        given["contrasts"] = torch.randn(m, 5, generator=g).to(dtype).requires_grad_()
        given["contrast_assignments"] = torch.rand(m, c, generator=g).to(dtype)
        leaves.append(given["contrasts"])
    temperature = torch.tensor(0.3, requires_grad=True)
    return cluster_infonce(x, temperature=temperature, **given), [*leaves, temperature]


def kept_of(loss: Tensor) -> Tensor:
    """What the node of the statistics has kept, the last of its saved tensors."""
    nodes = [loss.grad_fn]
    for node in nodes:
        if node is not None and node.name() == "_SoftStatsBackward":
            return node.saved_tensors[-1]
        nodes += [] if node is None else [following for following, _ in node.next_functions]
    raise AssertionError("no node of the statistics")


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", KEPT)
def test_kept_weights_give_the_same_bits(case: str, dtype: torch.dtype, threads: int, monkeypatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(native, "PRODUCTS", 1)  # as many threads for few rows too
    try:
        results = []
        for fewest in (64, 71):
            monkeypatch.setattr(soft_cpu, "FEWEST_COLUMNS", fewest)
            loss, leaves = soft_loss(case, 70, dtype)
            assert (kept_of(loss).numel() > 0) == (fewest == 64)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for kept, computed in zip(*results, strict=True):
            assert torch.equal(kept, computed)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
def test_kept_weights_take_no_more_memory_than_rows_and_assignments(monkeypatch) -> None:
    n, m, _ = KEPT["two sets"]
    assert m is not None
    for fewest, c in ((1, 10), (1, 20), (64, 63), (64, 64)):
        monkeypatch.setattr(soft_cpu, "FEWEST_COLUMNS", fewest)
        kept = kept_of(soft_loss("two sets", c)[0])
        assert (kept.numel() > 0) == (c >= fewest and n * m <= (n + m) * (5 + c))
    with torch.no_grad():
        assert soft_loss("two sets", 64)[0].grad_fn is None


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
def test_kept_weights_may_be_moved_and_used_again() -> None:
    """A hook returns memory with another alignment; a second backward reads the same weights."""

    def moved(values: Tensor) -> Tensor:
        room = torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape)
        return room.copy_(values.detach())

    expected = torch.autograd.grad(*soft_loss("self-contrast", 256))
    with torch.autograd.graph.saved_tensors_hooks(lambda values: values, moved):
        loss, leaves = soft_loss("self-contrast", 256)
    assert kept_of(loss).data_ptr() % 64
    for _ in range(2):
        for got, truth in zip(torch.autograd.grad(loss, leaves, retain_graph=True), expected, strict=True):
            assert torch.equal(got, truth)
    loss, leaves = soft_loss("self-contrast", 256)
    (gradient,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    torch.testing.assert_close(gradient, expected[0])
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        gradient.sum().backward()


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
def test_kept_weights_in_another_form() -> None:
    """With other strides they are copied; of another size or dtype they are not used."""
    loss, leaves = soft_loss("self-contrast", 256)
    numbers = kept_of(loss).numel()
    expected = torch.autograd.grad(loss, leaves)
    forms = (
        lambda kept: kept.repeat_interleave(2)[::2],
        lambda kept: kept[:-1],
        lambda kept: kept.half(),
        lambda kept: kept[:1].expand(numbers // 2),
    )
    for form in forms:
        changed = []

        def unpacked(values: Tensor, form=form, changed=changed) -> Tensor:
            if values.shape != (numbers,):
                return values
            changed.append(values)
            return form(values)

        with torch.autograd.graph.saved_tensors_hooks(lambda values: values, unpacked):
            loss, leaves = soft_loss("self-contrast", 256)
        for got, truth in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            assert torch.equal(got, truth)
        assert len(changed) == 1


@pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")
def test_checkpointing_with_a_mode_in_the_backward_only() -> None:
    """The second forward then runs the operators, and must save as many tensors."""
    x = torch.randn(20, 5, generator=generator(0)).requires_grad_()
    r = torch.rand(20, 256, generator=generator(1))
    expected = torch.autograd.grad(cluster_infonce(x, assignments=r), x)[0]
    loss = checkpoint(lambda x: cluster_infonce(x, assignments=r), x, use_reentrant=False)
    with FlopCounterMode(display=False):
        loss.backward()
    torch.testing.assert_close(x.grad, expected)
