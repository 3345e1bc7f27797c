"""Queues and banks whose rows have tags: content, state, and losses against them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import ClusterInfoNCE, MemoryBank, MemoryQueue, MoCoLoss, PairContrastiveLoss
from fastcl.memory_state import Memory
from tests.support.backends import QUICK, running
from tests.support.strategies import generator

N, D, SIZE = 9, 6, 11
F64 = torch.float64


@pytest.fixture(params=QUICK)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param) as name:
        yield name


def rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, generator=generator(seed), dtype=F64)


def tags(n: int, count: int, seed: int, each: float = 1.5) -> Tensor:
    return torch.rand(n, count, generator=generator(seed)) < each / count


def filled(kind: str, count: int = 70, most: int = 7) -> Memory:
    """A queue that has wrapped around, or a bank with gaps."""
    if kind == "queue":
        queue = MemoryQueue(SIZE, D, dtype=F64, ids=True, tags=count)
        for seed in (1, 2):
            queue.enqueue(rows(most, seed), tags(most, count, seed + 10), torch.arange(most) + 10 * seed)
        return queue
    bank = MemoryBank(SIZE, D, dtype=F64, tags=count)
    for seed in (1, 2):
        bank.update(torch.arange(most) * 3 % SIZE, rows(most, seed), tags(most, count, seed + 10))
    return bank


KINDS = ("queue", "bank")


@pytest.mark.parametrize("count", [1, 5, 64, 70, 128])
def test_a_queue_returns_the_tags_of_its_latest_rows(count: int) -> None:
    queue, everything = MemoryQueue(SIZE, D, tags=count), torch.zeros(0, count, dtype=torch.bool)
    assert queue.clusters is not None
    assert queue.clusters.shape == (0, count)
    for step, n in enumerate((4, 0, 5, 4, 14)):
        new = tags(n, count, step)
        new[-1:, -1] = True  # the last bit of the last word
        queue.enqueue(rows(n, step), new)
        everything = torch.cat((everything, new))
        assert torch.equal(queue.clusters, everything[-SIZE:])
    assert queue.tag_words is not None
    assert queue.tag_words.shape == (SIZE, -(-count // 64))


def test_a_bank_keeps_tags_by_index() -> None:
    bank = MemoryBank(SIZE, D, tags=3)
    one = torch.tensor([[True, False, False], [False, True, True]])
    bank.update(torch.tensor([4, 7]), rows(2, 0), one)
    bank.update(torch.tensor([7, 2]), rows(2, 1))  # keeps the tags of 7; 2 has none
    bank.update(torch.tensor([4, 4]), rows(2, 2), one)  # in turn
    assert bank.clusters.tolist() == [[False] * 3, [False, True, True], [False, True, True]]
    assert bank.ids.tolist() == [2, 4, 7]
    bank.reset()
    assert bank.clusters.shape == (0, 3)


def calls() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name, arguments beside the embeddings and options."""
    given = {"clusters": tags(N, 70, 3)}
    views = {"embeddings": rows(2 * N, 4).view(N, 2, D)}
    return {
        "plain": (given, {}),
        "ids, a bias, statistics": (
            {**given, "ids": torch.arange(N) + 8, "contrast_bias": None, "return_stats": True}, {}
        ),
        "a key, weights": ({**given, "positives": rows(N, 6), "weights": torch.arange(N) / N}, {"margin": 0.1}),
        "views, hard negatives": (
            {**given, **views, "hard_negatives": rows(2 * N, 7).view(N, 2, D)}, {"reduction": "none", "form": "inside"}
        ),
        "both ways": (given, {"symmetric": True, "denominator": "negatives"}),
        "a learned temperature": (given, {"temperature": nn.Parameter(torch.tensor(0.4, dtype=F64))}),
    }  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", calls())
def test_the_loss_is_that_of_tensors_with_the_same_rows_and_tags(
    backend: str, name: str, kind: str, beside: bool
) -> None:
    """beside: the memory is listed with a tensor and with a queue whose rows have no tags."""
    arguments, options = calls()[name]
    memory, plain = filled(kind), MemoryQueue(2, D, dtype=F64)
    plain.enqueue(rows(2, 8))
    stored, tagged = memory.embeddings, memory.clusters
    parts, found_tags, found_ids = [stored], [tagged], [memory.ids]
    y = nn.functional.normalize(rows(2 * N + 1 if "embeddings" in arguments else N + 1, 9), dim=1)
    if beside:
        views = 2 if "embeddings" in arguments else 1
        own = torch.cat((arguments["clusters"].repeat_interleave(views, 0), torch.zeros(1, 70, dtype=torch.bool)))
        parts, found_tags = [y, stored, plain.embeddings], [own, tagged, torch.zeros(2, 70, dtype=torch.bool)]
        found_ids = [torch.full((len(y),), -1), memory.ids, torch.full((2,), -1)]
    if "contrast_bias" in arguments:
        bias = [rows(len(part), 5)[:, 0] if part is y else torch.full((len(part),), 0.7, dtype=F64) for part in parts]
        if beside:
            bias[0][1] = -torch.inf
        arguments |= {"contrast_bias": torch.cat(bias)}  # of a queue in the order of its slots, not by age
    contrasts = [y, memory, plain] if beside else memory
    plainly = arguments | {"contrasts": torch.cat(parts), "contrast_clusters": torch.cat(found_tags)}
    if "ids" in arguments:
        plainly["contrast_ids"] = torch.cat(found_ids)
    if beside:  # a pair of tensors is positive without tags too, which contrast_clusters cannot say
        arguments, plainly = (given | {"clusters": given["clusters"].clone()} for given in (arguments, plainly))
        for given in (arguments, plainly):
            given["clusters"][:, 0] = True
        plainly["contrast_clusters"][: len(y) - 1, 0] = True
    results = []
    for given in (arguments | {"contrasts": contrasts}, plainly):
        leaf = given.get("embeddings", rows(N, 0)).clone().requires_grad_()
        loss = ClusterInfoNCE(**({"temperature": 0.3} | options))
        found = loss(**{**given, "embeddings": leaf})
        stats = ()
        if isinstance(found, tuple):
            found, summary = found
            stats = (summary.positive_similarity, summary.entropy)
        if isinstance(memory, MemoryQueue) and given is not plainly:
            memory.enqueue(rows(3, 20), tags(3, 70, 21), torch.arange(3))  # does not change the backward
        found.sum().backward()
        of_scale = (loss.temperature.grad,) if isinstance(loss.temperature, nn.Parameter) else ()
        results.append((found.detach(), leaf.grad, *stats, *of_scale))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def copies() -> dict[str, Callable[[Any], Any]]:
    def loaded(memory: Any) -> Any:
        fresh = filled("queue" if isinstance(memory, MemoryQueue) else "bank", most=3)
        fresh.load_state_dict(copy.deepcopy(memory.state_dict()), strict=True)
        return fresh

    return {
        "copy.deepcopy": copy.deepcopy,
        "pickle": lambda memory: pickle.loads(pickle.dumps(memory)),
        "state_dict": loaded,
        "half and back": lambda memory: copy.deepcopy(memory).half().double(),
    }


@pytest.mark.parametrize("how", copies())
@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_tags(kind: str, how: str) -> None:
    memory = filled(kind)
    found = copies()[how](memory)
    assert torch.equal(found.clusters, memory.clusters)
    assert len(found) == len(memory)
    assert "tags=70" in repr(found)
    z, own = rows(N, 0), tags(N, 70, 3)
    tolerance = 1e-2 if how == "half and back" else 0
    expected = ClusterInfoNCE(0.3)(z, own, contrasts=memory)
    torch.testing.assert_close(ClusterInfoNCE(0.3)(z, own, contrasts=found), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_does_not_fit_changes_nothing(kind: str) -> None:
    memory = filled(kind)
    before = copy.deepcopy(memory.state_dict())
    without = MemoryQueue(SIZE, D, clusters=True, ids=True) if kind == "queue" else MemoryBank(SIZE, D)
    more = filled(kind, 128)
    for state, message in (
        (without.state_dict(), r"Missing key.*tag_words"),
        (filled(kind, 300).state_dict(), r"tag_words: expected shape \[11, 2\], got \[11, 5\]"),
        (more.state_dict() | {"tag_words": torch.full((SIZE, 2), -1)}, "tag_words: expected 70 tags, got more"),
    ):
        with pytest.raises(RuntimeError, match=message):
            memory.load_state_dict(state)
        for name, value in memory.state_dict().items():
            assert torch.equal(value, before[name])
    with pytest.raises(RuntimeError, match=r"Missing key.*cluster_ids"):
        without.load_state_dict(before)


def test_a_memory_that_was_pickled_before_there_were_tags() -> None:
    queue = MemoryQueue(SIZE, D, clusters=True)
    del queue._buffers["tag_words"]
    again = pickle.loads(pickle.dumps(queue))
    again.enqueue(rows(3, 0), torch.arange(3))
    assert again.clusters.tolist() == [0, 1, 2]
    assert "tag_words" not in again.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_whole(kind: str) -> None:
    memory, own = filled(kind, most=SIZE), tags(N, 70, 3)
    assert len(memory) == SIZE
    x = rows(N, 0).requires_grad_()

    def call(x: Tensor, own: Tensor) -> Tensor:
        loss: Tensor = ClusterInfoNCE(0.3)(x, own, contrasts=memory)
        return loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, own), call(x, own))
    gradients = [torch.autograd.grad(f(x, own), x)[0] for f in (compiled, call)]
    torch.testing.assert_close(*gradients)
    if isinstance(memory, MemoryQueue):  # a full queue keeps its shape: nothing is compiled again
        memory.enqueue(rows(3, 5), tags(3, 70, 6), torch.arange(3))
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x, own), call(x, own))


def test_an_empty_queue_and_no_tags() -> None:
    x, own = rows(N, 0).requires_grad_(), tags(N, 5, 3)
    queue = MemoryQueue(SIZE, D, dtype=F64, tags=5)
    for n in (0, 4):
        queue.enqueue(rows(n, 1), torch.zeros(n, 5, dtype=torch.bool))
        loss = ClusterInfoNCE(0.3)(x, own, contrasts=queue)
        assert loss.item() == 0  # no stored row shares a tag
        loss.backward()
        assert not x.grad.any()
    queue.enqueue(torch.full((1, D), torch.nan), own[:1] | True)
    assert ClusterInfoNCE(0.3)(x, own | True, contrasts=queue).isnan()


x = rows(N, 0)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "both": (lambda: MemoryQueue(3, D, clusters=True, tags=5), "^tags: expected None with clusters=True, got 5"),
    "none": (lambda: MemoryQueue(3, D, tags=0), "^tags: expected at least 1, got 0"),
    "a flag": (lambda: MemoryBank(3, D, tags=True), "^tags: expected an integer"),
    "no tags": (lambda: filled("queue").enqueue(x), "^clusters: expected a bool tensor of tags, got None"),
    "integers": (
        lambda: filled("queue").enqueue(x, torch.arange(N), torch.arange(N)),
        "^clusters: expected a bool tensor of tags, got torch.int64",
    ),
    "another number": (
        lambda: filled("queue").enqueue(x, tags(N, 5, 0), torch.arange(N)),
        r"^clusters: expected shape \[9, 70\], got \[9, 5\]",
    ),
    "another number in a bank": (
        lambda: filled("bank").update(torch.arange(N), x, tags(3, 70, 0)),
        r"^clusters: expected shape \[9, 70\], got \[3, 70\]",
    ),
    "tags for integers": (
        lambda: MemoryQueue(3, D, dtype=F64, clusters=True).enqueue(x, tags(N, 5, 0)), "^clusters: expected integers",
    ),
    "no clusters in the loss": (
        lambda: ClusterInfoNCE()(x, contrasts=filled("queue"), positives=x), "^clusters: expected a tensor, as a queue",
    ),
    "integers in the loss": (
        lambda: ClusterInfoNCE()(x, torch.arange(N), contrasts=filled("queue")),
        r"^clusters: expected torch.bool \[N, 70\], .* stores tags, got torch.int64 \[9\]",
    ),
    "another number in the loss": (
        lambda: ClusterInfoNCE()(x, tags(N, 71, 0), contrasts=filled("bank")),
        r"^clusters: expected torch.bool \[N, 70\], .* got torch.bool \[9, 71\]",
    ),
    "a queue of integers": (
        lambda: ClusterInfoNCE()(x, tags(N, 5, 0), contrasts=MemoryQueue(3, D, dtype=F64, clusters=True)),
        r"^clusters: expected integers, .* stores integers, got tags \(MemoryQueue\(tags=T\) stores them\)",
    ),
    "a bank of integers": (
        lambda: ClusterInfoNCE()(x, tags(N, 5, 0), contrasts=MemoryBank(3, D, dtype=F64)),
        "^clusters: expected integers, as a queue or bank",
    ),
    "a queue without": (
        lambda: ClusterInfoNCE()(x, tags(N, 5, 0), contrasts=MemoryQueue(3, D, dtype=F64)),
        r"^positives: expected a tensor, .* without tags \(MemoryQueue\(tags=T\) stores them\), got None",
    ),
    "moco": (lambda: MoCoLoss()(x, x, filled("queue")), "^queue: expected one without tags"),
    "pairs": (
        lambda: PairContrastiveLoss()(x, torch.arange(N), contrasts=filled("queue")),
        "^contrasts: expected a queue or bank that stores clusters, got one that stores tags",
    ),
    "sigmoid": (
        lambda: fastcl.SigmoidLoss()(x, torch.arange(N), contrasts=filled("queue")), "^clusters: expected torch.bool",
    ),
    "form": (
        lambda: ClusterInfoNCE(form="pairs")(x, tags(N, 70, 0), contrasts=filled("queue")),
        "^form: expected 'outside' or 'inside' with tags as clusters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("loss", [fastcl.DebiasedLoss(0.3, 0.1), fastcl.HardNegativeLoss(0.3), fastcl.SigmoidLoss()])
def test_losses_without_tags_say_so(loss: nn.Module) -> None:
    z = rows(2 * N, 0).view(N, 2, D)
    with pytest.raises(TypeError, match=r"^clusters: expected integers, got torch.bool"):
        loss(z, tags(N, 5, 0))
    with pytest.raises(ValueError, match=r"^ids: expected None for self-contrast"):
        loss(z, ids=torch.arange(N))
