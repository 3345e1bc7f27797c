"""Losses against stored rows use the values at the time of the call, and no later ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import ClusterInfoNCE, MemoryBank, MemoryQueue, MoCoLoss
from fastcl.losses.batch import Tensors, batch
from fastcl.ops.contrastive import op
from tests.support.backends import VARIANTS
from tests.support.pairs import pairs
from tests.support.strategies import generator
from tests.support.tolerances import check

N, D, T = 13, 10, 0.1


def rows(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, D, generator=generator(seed)).to(dtype)


def numbers(n: int, seed: int, most: int = 5) -> Tensor:
    return torch.randint(-1, most, (n,), generator=generator(seed))


def a_queue(dtype: torch.dtype, clusters: bool = False, ids: bool = False, seed: int = 10) -> MemoryQueue:
    """A queue that has wrapped around, so that storage order and age order differ."""
    queue = MemoryQueue(31, D, dtype=dtype, clusters=clusters, ids=ids)
    for step in range(2):
        given = {name: numbers(23, seed + step + 50) for name, on in (("clusters", clusters), ("ids", ids)) if on}
        queue.enqueue(rows(23, seed + step), **given)
    return queue


def a_bank(dtype: torch.dtype, clusters: bool = False, whole: bool = True) -> MemoryBank:
    bank = MemoryBank(29, D, dtype=dtype)
    indices = torch.randperm(29, generator=generator(3))[: None if whole else 20]
    for step in range(2):
        bank.update(indices, rows(len(indices), 20 + step), numbers(len(indices), 30) if clusters else None)
    return bank


def equal(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, None] == right) & (left >= 0)[:, None]


def formula(
    embeddings: Tensor, stored: Tensor, positive: Tensor, admissible: Tensor, key: Tensor | None, live: Tensor | None
) -> Tensor:
    """Mean over anchors with a positive of lse over admissible contrasts and the key, minus the mean positive."""
    x = nn.functional.normalize(embeddings, dim=1)
    y = stored if live is None else torch.cat([nn.functional.normalize(live, dim=1), stored])
    logits = (x @ y.T / T).masked_fill(~admissible, -torch.inf)
    positive = positive & admissible
    if key is not None:
        s = (x * nn.functional.normalize(key, dim=1)).sum(1, keepdim=True) / T
        logits, positive = torch.cat([s, logits], 1), nn.functional.pad(positive, (1, 0), value=True)
    rows = positive.any(1)
    sums = torch.where(positive, logits, 0).sum(1)[rows]
    return (logits[rows].logsumexp(1) - sums / positive.sum(1)[rows]).mean()


def posed(case: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the loss, and of the formula."""
    x, key = rows(N, 0, dtype), rows(N, 1, dtype)
    clusters, ids = numbers(N, 2), numbers(N, 4, 29)
    nobody = torch.full((N,), -1)
    if case == "negatives":
        queue = a_queue(dtype)
        return (
            {"embeddings": x, "positives": key, "contrasts": queue},
            {"stored": queue.embeddings, "positive": equal(nobody, torch.arange(31)), "key": key},
        )
    if case in ("clusters", "clusters, ids", "clusters, key"):
        queue = a_queue(dtype, clusters=True, ids="ids" in case)
        arguments: dict[str, Any] = {"embeddings": x, "clusters": clusters, "contrasts": queue}
        plain: dict[str, Any] = {"stored": queue.embeddings, "positive": equal(clusters, queue.clusters)}
        if "ids" in case:
            arguments["ids"], plain["admissible"] = ids, ~equal(ids, queue.ids)
        if "key" in case:
            arguments["positives"] = plain["key"] = key
        return arguments, plain
    if case == "bank, own row":
        bank = a_bank(dtype, whole=False)
        return (
            {"embeddings": x, "clusters": ids, "contrasts": bank},
            {"stored": bank.embeddings, "positive": equal(ids, bank.ids)},
        )
    if case == "bank, own row left out":
        bank = a_bank(dtype)
        return (
            {"embeddings": x, "positives": key, "contrasts": bank, "ids": ids},
            {"stored": bank.embeddings, "positive": equal(nobody, bank.ids), "admissible": ~equal(ids, bank.ids),
             "key": key},
        )  # fmt: skip
    if case == "bank, clusters":
        bank = a_bank(dtype, clusters=True, whole=False)
        return (
            {"embeddings": x, "clusters": clusters, "contrasts": bank, "ids": ids},
            {"stored": bank.embeddings, "positive": equal(clusters, bank.clusters),
             "admissible": ~equal(ids, bank.ids)},
        )  # fmt: skip
    assert case == "a tensor and both"
    queue, bank, live = a_queue(dtype, clusters=True, ids=True), a_bank(dtype), rows(N + 2, 5, dtype)
    plainly, theirs = a_queue(dtype, seed=40), numbers(N + 2, 6)
    stored = torch.cat([queue.embeddings.float(), bank.embeddings.float(), plainly.embeddings.float()])
    without = torch.full((31,), -1)
    other_clusters = torch.cat([theirs, queue.clusters, bank.clusters, without])
    other_ids = torch.cat([torch.full((N + 2,), -1), queue.ids, bank.ids, without])
    return (
        {"embeddings": x, "clusters": clusters, "contrasts": [live, queue, bank, plainly], "ids": ids,
         "contrast_clusters": theirs},
        {"stored": stored, "live": live, "positive": equal(clusters, other_clusters),
         "admissible": ~equal(ids, other_ids)},
    )  # fmt: skip


CASES = (
    "negatives", "clusters", "clusters, ids", "clusters, key", "bank, own row", "bank, own row left out",
    "bank, clusters", "a tensor and both",
)  # fmt: skip


@pairs(case=CASES, backend=VARIANTS, dtype=[torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_exact_in_the_stored_values(backend, case, dtype) -> None:
    arguments, plain = posed(case, dtype)
    plain = {"admissible": torch.ones_like(plain["positive"]), "key": None, "live": None} | plain
    leaves = {name: plain[name] for name in ("key", "live") if plain[name] is not None}
    leaves["embeddings"] = arguments["embeddings"]

    def evaluated(how: torch.dtype, order: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        wide = {name: order(leaf.to(how)).requires_grad_() for name, leaf in leaves.items()}
        loss = formula(**(plain | {"stored": order(plain["stored"].to(how))} | wide))
        return loss.detach(), [order(g) for g in torch.autograd.grad(loss, list(wide.values()))]

    truth, expected = evaluated(torch.float64, lambda t: t)
    draws = [evaluated(torch.float32, lambda t: t), evaluated(torch.float32, lambda t: t.flip(-1))]
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss = ClusterInfoNCE(T)(**arguments)
    got = torch.autograd.grad(loss, list(leaves.values()))
    check("loss", loss, truth, [value for value, _ in draws])
    for name, gradient, right, i in zip(leaves, got, expected, range(len(got)), strict=True):
        eager = [gradients[i] for _, gradients in draws]
        check(f"gradient of {name}", gradient, right, eager, half_rows=None if dtype == torch.float32 else dtype)


@pytest.mark.parametrize("case", ["negatives", "clusters, ids", "bank, own row", "bank, own row left out"])
def test_what_comes_after_the_forward_does_not_change_its_backward(backend, case) -> None:
    gradients = []
    for meddle in (False, True):
        arguments, _ = posed(case, torch.float32)
        x = arguments["embeddings"].requires_grad_()
        # reduction="none", so the gradient is computed in the backward
        anchors = x.repeat(1, 1)
        loss = ClusterInfoNCE(T, reduction="none")(**(arguments | {"embeddings": anchors}))
        memory = arguments["contrasts"]
        if meddle:
            before = memory.embeddings
            if isinstance(memory, MemoryBank):
                memory.update(torch.arange(29), rows(29, 99), numbers(29, 98))
            else:
                given = {name: numbers(40, 97) for name in ("clusters", "ids") if getattr(memory, name) is not None}
                memory.enqueue(rows(40, 99), **given)
            assert not torch.equal(before, memory.embeddings)
        loss.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_moco_takes_a_queue_as_it_takes_its_rows(backend) -> None:
    queue = a_queue(torch.float32)
    query, key = rows(N, 0), rows(N, 1)
    torch.testing.assert_close(MoCoLoss()(query, key, queue), MoCoLoss()(query, key, queue.embeddings))
    empty = MemoryQueue(5, D)
    assert MoCoLoss()(query, key, empty).item() == pytest.approx(0, abs=1e-6)
    loss = ClusterInfoNCE()(query, numbers(N, 2), contrasts=MemoryQueue(5, D, clusters=True))
    assert loss.item() == 0


def test_views_of_a_sample_meet_a_queue(backend) -> None:
    queue = a_queue(torch.float32, clusters=True)
    z, labels = rows(2 * N, 0).reshape(N, 2, D), numbers(N, 2)
    loss = ClusterInfoNCE(T, reduction="none")(z, labels, contrasts=queue)
    flat = ClusterInfoNCE(T, reduction="none")(z.flatten(0, 1), labels.repeat_interleave(2), contrasts=queue)
    assert loss.shape == (N, 2)
    torch.testing.assert_close(loss.flatten(), flat)


def test_a_loss_without_a_gradient_reads_the_rows_in_place() -> None:
    queue = a_queue(torch.float32)
    assert queue.stored(kept=False).rows.data_ptr() == queue.rows.data_ptr()
    with torch.no_grad():
        given = Tensors(rows(N, 0), positives=rows(N, 1), contrasts=queue)
        contrasts = batch(given, normalize=True).contrasts
    assert contrasts.values.data_ptr() == queue.rows.data_ptr()


def test_compiled_without_a_break() -> None:
    query, key, queue = rows(N, 0).requires_grad_(), rows(N, 1), a_queue(torch.float32)
    loss = MoCoLoss()

    def call(query: Tensor, key: Tensor) -> Tensor:
        return loss(query, key, queue)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), call(query, key))
    queue.enqueue(rows(3, 7))  # a full queue keeps its shape: no recompilation
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(query, key), call(query, key))


def test_a_bank_seen_full_compiles_without_a_break() -> None:
    bank = a_bank(torch.float32)
    assert len(bank) == 29
    loss, x = ClusterInfoNCE(T), rows(N, 0)
    call = lambda x: loss(x, torch.arange(N), contrasts=bank)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
    bank.update(torch.arange(3), rows(3, 1))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), call(x))


WRONG = {
    "clusters missing": (
        lambda x: {"contrasts": a_queue(x.dtype, clusters=True)},
        r"^clusters: expected a tensor, as a queue or bank of the contrasts stores clusters, got None",
    ),
    "positives missing": (lambda x: {"contrasts": a_queue(x.dtype)}, r"^positives: expected a tensor, .* got None"),
    "positives missing, with clusters": (
        lambda x: {"contrasts": a_queue(x.dtype), "clusters": numbers(N, 1)},
        r"^positives: expected a tensor",
    ),
    "contrast_clusters beside a queue": (
        lambda x: {"contrasts": a_queue(x.dtype, clusters=True), "clusters": numbers(N, 1),
                   "contrast_clusters": numbers(31, 1)},
        r"^contrast_clusters: expected None",
    ),
    "contrast_ids beside a bank": (
        lambda x: {"contrasts": a_bank(x.dtype), "ids": numbers(N, 1), "contrast_ids": numbers(29, 1), "positives": x},
        r"^contrast_ids: expected None",
    ),
    "ids without any": (
        lambda x: {"contrasts": a_queue(x.dtype), "positives": x, "ids": numbers(N, 1)},
        r"^contrast_ids: expected a tensor, as ids is given",
    ),
    "too few rows of a tensor": (
        lambda x: {"contrasts": [x[:3], a_queue(x.dtype)]},
        r"^contrasts: expected at least 13 rows, .* got 3 rows",
    ),
    "another dimension": (
        lambda x: {"contrasts": MemoryQueue(3, D + 1), "positives": x},
        r"^contrasts: expected rows of dimension 10",
    ),
    "bias of another length": (
        lambda x: {"contrasts": a_queue(x.dtype), "positives": x, "contrast_bias": torch.ones(30)},
        r"^contrast_bias: expected shape \[31\], got \[30\]",
    ),
    "an empty list": (
        lambda x: {"contrasts": []},
        r"^contrasts: expected a tensor, a MemoryQueue.* non-empty list of these, got an empty list",
    ),
    "a number in the list": (
        lambda x: {"contrasts": [a_queue(x.dtype), 3]},
        r"^contrasts\[1\]: expected a tensor, a MemoryQueue or a MemoryBank, got int",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case) -> None:
    make, message = WRONG[case]
    x = rows(N, 0)
    with pytest.raises((TypeError, ValueError), match=message):
        ClusterInfoNCE()(x, **make(x))
    if case == "clusters missing":
        with pytest.raises(ValueError, match=r"^queue: expected one without clusters"):
            MoCoLoss()(x, x, a_queue(x.dtype, clusters=True))
        with pytest.raises(TypeError, match=r"^queue: expected a tensor or a MemoryQueue without .*, got MemoryBank"):
            MoCoLoss()(x, x, a_bank(x.dtype))


def test_contrasts_that_are_negatives_only_have_no_clusters_to_arrange(monkeypatch) -> None:
    seen = []
    plain = op.statistics

    def watched(problem, backend):
        seen.append(problem)
        return plain(problem, backend)

    for module in (op, fastcl.ops.contrastive.direct):
        monkeypatch.setattr(module, "statistics", watched)
    MoCoLoss(reduction="sum")(rows(N, 0), rows(N, 1), a_queue(torch.float32))  # the mean has a path of its own
    assert seen[0].anchors.clusters is None
