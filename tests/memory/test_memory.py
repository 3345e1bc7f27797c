"""Queue and bank against plain lists of rows, after any sequence of operations."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from fastcl import MemoryBank, MemoryQueue
from tests.support.strategies import DTYPES, generator

SEEDS = st.integers(0, 2**20)
FEW = settings(max_examples=25, stateful_step_count=12)


def batch(n: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(n, dim, generator=generator(seed)) * 3
    if n > 2:
        rows[1] = 0
    return rows.to(dtype)


def unit(row: Tensor) -> Tensor:
    norm = row.double().norm()
    return row.double() / norm if norm > 0 else row.double() * 0


def close(rows: Tensor, expected: list[Tensor], dtype: torch.dtype, roundings: int = 1) -> None:
    truth = torch.stack(expected) if expected else torch.empty(0, rows.shape[1], dtype=torch.float64)
    assert rows.dtype == dtype
    single = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    atol = roundings * (torch.finfo(dtype).eps + 4 * single)
    torch.testing.assert_close(rows.double(), truth, rtol=0, atol=atol)


def reloaded(module: Any, fresh: Any) -> Any:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


class QueueMachine(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 7), dim=st.integers(1, 3), dtype=st.sampled_from(DTYPES), stores=st.integers(0, 3))
    def make(self, size: int, dim: int, dtype: torch.dtype, stores: int) -> None:
        self.made: dict[str, Any] = {
            "size": size, "dim": dim, "dtype": dtype, "clusters": bool(stores & 1), "ids": bool(stores & 2)
        }  # fmt: skip
        self.queue = MemoryQueue(**self.made)
        self.rows: list[tuple[Tensor, int, int]] = []

    def arguments(self, n: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
        g = generator(seed)
        numbers = {name: torch.randint(-3, 9, (n,), generator=g) for name in ("clusters", "ids")}
        return {"embeddings": batch(n, self.made["dim"], seed, dtype).requires_grad_()} | {
            name: value for name, value in numbers.items() if self.made[name]
        }

    @rule(n=st.integers(0, 17), seed=SEEDS, dtype=st.sampled_from(DTYPES))
    def enqueue(self, n: int, seed: int, dtype: torch.dtype) -> None:
        arguments = self.arguments(n, seed, dtype)
        self.queue.enqueue(**arguments)
        for i in range(n):
            ids = [int(arguments[name][i]) if name in arguments else -1 for name in ("clusters", "ids")]
            self.rows.append((unit(arguments["embeddings"].detach()[i]), *(max(number, -1) for number in ids)))
        self.rows = self.rows[-self.made["size"] :]

    @rule(seed=SEEDS, wrong=st.sampled_from(["dim", "length", "dtype", "missing", "superfluous", "rank"]))
    def refuse(self, seed: int, wrong: str) -> None:
        """A call with bad input changes no row; the invariant checks that."""
        arguments = self.arguments(3, seed, torch.float32)
        if wrong == "dim":
            arguments["embeddings"] = batch(3, self.made["dim"] + 1, seed)
        elif wrong == "rank":
            arguments["embeddings"] = arguments["embeddings"][0]
        elif wrong == "dtype":
            arguments["embeddings"] = torch.ones(3, self.made["dim"], dtype=torch.int64)
        else:
            stored = [name for name in ("clusters", "ids") if self.made[name]]
            absent = [name for name in ("clusters", "ids") if not self.made[name]]
            if (not absent) if wrong == "superfluous" else (not stored):
                return
            if wrong == "superfluous":
                arguments[absent[-1]] = torch.arange(3)
            elif wrong == "missing":
                del arguments[stored[-1]]
            else:
                arguments[stored[-1]] = torch.arange(4)
        with pytest.raises((TypeError, ValueError), match=r": expected .* got"):
            self.queue.enqueue(**arguments)

    @rule()
    def save_and_load(self) -> None:
        self.queue = reloaded(self.queue, MemoryQueue(**self.made))

    @rule()
    def load_what_does_not_fit(self) -> None:
        other = MemoryQueue(**(self.made | {"size": self.made["size"] + 1}))
        with pytest.raises(RuntimeError, match="rows: expected shape"):
            self.queue.load_state_dict(other.state_dict())
        state = MemoryQueue(**self.made).state_dict()
        del state["rows"]
        with pytest.raises(RuntimeError, match="Missing"):
            self.queue.load_state_dict(state)

    @invariant()
    def same_as_the_list(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert len(self.queue) == len(self.rows)
        assert not self.queue.embeddings.requires_grad
        close(self.queue.embeddings, [row for row, _, _ in self.rows], self.made["dtype"])
        for place, name in ((1, "clusters"), (2, "ids")):
            stored = getattr(self.queue, name)
            assert (stored is not None) == self.made[name]
            if stored is not None:
                assert stored.tolist() == [row[place] for row in self.rows]


class BankMachine(RuleBasedStateMachine):
    @initialize(
        size=st.integers(1, 6), dim=st.integers(1, 3), dtype=st.sampled_from(DTYPES), momentum=st.sampled_from([0, 0.5])
    )
    def make(self, size: int, dim: int, dtype: torch.dtype, momentum: float) -> None:
        self.made: dict[str, Any] = {"num_samples": size, "dim": dim, "dtype": dtype, "momentum": momentum}
        self.bank = MemoryBank(**self.made)
        self.rows: dict[int, Tensor] = {}
        self.clusters: dict[int, int] | None = None
        self.roundings = 1

    @rule(n=st.integers(0, 9), seed=SEEDS, dtype=st.sampled_from(DTYPES), clusters=st.booleans())
    def update(self, n: int, seed: int, dtype: torch.dtype, clusters: bool) -> None:
        g = generator(seed + 1)
        # Rows of similar direction: the mean of opposite rows would have any relative error.
        embeddings = (torch.rand(n, self.made["dim"], generator=g) + 0.5).to(dtype)
        indices = torch.randint(0, self.made["num_samples"], (n,), generator=g, dtype=torch.int32)
        ids = torch.randint(-2, 4, (n,), generator=g) if clusters else None
        self.bank.update(indices, embeddings.requires_grad_(), ids)
        if clusters and n:
            self.clusters = self.clusters or {}
        for i, index in enumerate(indices.tolist()):
            new = unit(embeddings.detach()[i])
            if index in self.rows:
                new = unit(self.made["momentum"] * self.rows[index] + (1 - self.made["momentum"]) * new)
            self.rows[index] = new
            if ids is not None:
                assert self.clusters is not None
                self.clusters[index] = max(int(ids[i]), -1)
        self.roundings += n  # each update rounds the row once and halves the earlier error

    @rule(seed=SEEDS, wrong=st.sampled_from(["dim", "length", "large", "negative", "float", "clusters"]))
    def refuse(self, seed: int, wrong: str) -> None:
        rows = batch(3, self.made["dim"] + (wrong == "dim"), seed)
        indices = torch.zeros(3 + (wrong == "length"), dtype=torch.int64)
        if wrong in ("large", "negative"):
            indices[-1] = self.made["num_samples"] if wrong == "large" else -1
        with pytest.raises((TypeError, ValueError), match=r": expected .* got"):
            self.bank.update(
                indices.float() if wrong == "float" else indices,
                rows,
                torch.arange(4) if wrong == "clusters" else None,
            )

    @rule()
    def save_and_load(self) -> None:
        self.bank = reloaded(self.bank, MemoryBank(**self.made))

    @invariant()
    def same_as_the_list(self) -> None:
        if not hasattr(self, "bank"):
            return
        known = sorted(self.rows)
        assert len(self.bank) == len(known)
        assert self.bank.ids.tolist() == known
        expected = known if self.clusters is None else [self.clusters.get(index, -1) for index in known]
        assert self.bank.clusters.tolist() == expected
        close(self.bank.embeddings, [self.rows[index] for index in known], self.made["dtype"], self.roundings)
        everything = torch.arange(self.made["num_samples"])
        zero = torch.zeros(self.made["dim"], dtype=torch.float64)
        rows = [self.rows.get(index, zero) for index in everything.tolist()]
        close(self.bank[everything], rows, self.made["dtype"], self.roundings)


QueueMachine.TestCase.settings = FEW
BankMachine.TestCase.settings = FEW
TestQueue = QueueMachine.TestCase
TestBank = BankMachine.TestCase


def test_a_queue_in_a_model_moves_and_copies_with_it() -> None:
    model = torch.nn.ModuleDict({"queue": MemoryQueue(4, 2, ids=True)})
    model["queue"].enqueue(batch(6, 2, 0), ids=torch.arange(6))
    other = copy.deepcopy(model)
    other["queue"].enqueue(batch(1, 2, 1), ids=torch.tensor([9]))
    assert model["queue"].ids.tolist() == [2, 3, 4, 5]
    assert other["queue"].ids.tolist() == [3, 4, 5, 9]
    model.load_state_dict(other.state_dict())
    assert model["queue"].ids.tolist() == [3, 4, 5, 9]
    assert "len=4" in repr(model)
    assert model["queue"]
    assert MemoryQueue(3, 2), "an empty queue is one all the same"


@pytest.mark.parametrize("tampered", [[4, 2], [1, 2], [-1, 4], [0, 5], [0], [0.0, torch.nan], [0.0, 3.5], "x"])
def test_counters_that_cannot_be_are_refused(tampered) -> None:
    queue = MemoryQueue(4, 2)
    queue.enqueue(batch(3, 2, 0))
    state = queue.state_dict() | {"_extra_state": torch.tensor(tampered) if isinstance(tampered, list) else tampered}
    before = queue.embeddings
    with pytest.raises(RuntimeError, match="_extra_state: expected"):
        queue.load_state_dict(state)
    assert torch.equal(queue.embeddings, before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", [[0.0, 0.0]] * 4, "rows: expected a tensor, got list"),
        ("rows", torch.zeros(4, 2, dtype=torch.int64), "rows: expected floating numbers, got torch.int64"),
        ("rows", torch.zeros(4, 2, dtype=torch.complex64), "rows: expected floating numbers, got torch.complex64"),
        ("filled", torch.full((4,), 0.3), "filled: expected truth values, got torch.float32"),
        ("cluster_ids", torch.zeros(4), "cluster_ids: expected integers, got torch.float32"),
        ("_extra_state", torch.tensor([torch.nan]), "_extra_state: expected a tensor of 1 integers"),
    ],
)
def test_values_that_do_not_fit_change_nothing(name, value, message) -> None:
    bank, other = MemoryBank(4, 2), MemoryBank(4, 2)
    for seed, one in enumerate((bank, other)):
        one.update(torch.arange(3), batch(3, 2, seed))
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(other.state_dict() | {name: value}, strict=False)
    for key, kept in bank.state_dict().items():
        assert torch.equal(kept, before[key])


@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_a_state_that_is_assigned(kind) -> None:
    """With assign=True the state's tensors become the memory's own, also for a memory on meta; only valid ones do."""

    def made():
        return MemoryQueue(4, 2, clusters=True, dtype=torch.bfloat16) if kind == "queue" else MemoryBank(4, 2)

    def store(memory, seed: int) -> None:
        rows, clusters = batch(3, 2, seed), torch.arange(3) + seed
        _ = memory.enqueue(rows, clusters) if kind == "queue" else memory.update(torch.arange(3), rows, clusters)

    full = made()
    store(full, 0)
    for fresh in (made(), made().to("meta")):
        state = copy.deepcopy(full.state_dict())
        fresh.load_state_dict(state, assign=True)
        assert fresh.rows is state["rows"] or fresh.rows.data_ptr() == state["rows"].data_ptr()
        same = copy.deepcopy(full)
        for memory in (fresh, same):
            store(memory, 1)
        assert fresh.embeddings.dtype == full.rows.dtype
        for name, value in same.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], value), name
    rows, clusters = full.rows, full.cluster_ids
    for name, value, message in (
        ("rows", rows.double(), "got torch.float64"),
        ("rows", rows.clone().requires_grad_(), "requiring a gradient"),
        ("rows", rows[:1].expand(4, 2), "strided"),
        ("cluster_ids", clusters.int(), "got torch.int32"),
    ):
        other = made()
        store(other, 2)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(RuntimeError, match=f"{name}: with assign=True expected .*{message}"):
            other.load_state_dict(full.state_dict() | {name: value}, assign=True)
        for key, kept in other.state_dict().items():
            assert torch.equal(kept, before[key])
        other.load_state_dict(full.state_dict() | {name: value.detach()})  # copied, so any such tensor will do
        assert other.rows.dtype == rows.dtype


def test_superfluous_and_missing_keys() -> None:
    full, plain = MemoryQueue(4, 2, clusters=True), MemoryQueue(4, 2)
    full.enqueue(batch(3, 2, 0), torch.arange(3))
    found = plain.load_state_dict(full.state_dict(), strict=False)
    assert found.unexpected_keys == ["cluster_ids"]
    assert not found.missing_keys
    assert torch.equal(plain.embeddings, full.embeddings)
    with pytest.raises(RuntimeError, match=r"Unexpected .*cluster_ids"):
        plain.load_state_dict(full.state_dict())
    plain.enqueue(batch(4, 2, 1))
    found = full.load_state_dict(plain.state_dict() | {"other": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["cluster_ids"]
    assert found.unexpected_keys == ["other"]
    assert full.clusters.tolist() == [0, 1, 2], "without its clusters, the state is not loaded"


class Projected(MemoryQueue):
    def __init__(self) -> None:
        super().__init__(4, 2, ids=True)
        self.projection = torch.nn.Linear(2, 2)
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.inner = MemoryBank(3, 2)


def test_a_subclass_with_state_of_its_own() -> None:
    queue = Projected()
    queue.enqueue(batch(3, 2, 0), ids=torch.arange(3))
    queue.inner.update(torch.arange(2), batch(2, 2, 1))
    torch.nn.init.normal_(queue.scale, generator=generator(2))
    other = reloaded(queue, Projected())
    assert torch.equal(other.embeddings, queue.embeddings)
    assert torch.equal(other.inner.embeddings, queue.inner.embeddings)
    assert torch.equal(other.scale, queue.scale)
    assert torch.equal(other.projection.weight, queue.projection.weight)
    state = queue.state_dict() | {"scale": torch.zeros(3)}
    fresh = Projected()
    with pytest.raises(RuntimeError, match=r"scale: expected shape \[2\], got \[3\]"):
        fresh.load_state_dict(state)
    assert len(fresh) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_a_bank_takes_any_integers(dtype) -> None:
    bank, indices = MemoryBank(5, 2), torch.tensor([4, 1])
    bank.update(indices.to(dtype), batch(2, 2, 0))
    assert bank.ids.tolist() == [1, 4]
    assert torch.equal(bank[indices.to(dtype)], bank[indices])
    with pytest.raises(ValueError, match=r"^indices: expected numbers from 0 to 4, got 7"):
        bank[torch.tensor([7]).to(dtype)]


def test_integers_of_numpy() -> None:
    queue = MemoryQueue(np.int64(3), np.int32(2))
    assert (queue.size, queue.dim, type(queue.size)) == (3, 2, int)
    assert MemoryBank(np.uint8(3), 2).num_samples == 3
    with pytest.raises(TypeError, match=r"^size: expected an integer"):
        MemoryQueue(torch.tensor(3), 2)


def test_a_bank_is_no_sequence() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(MemoryBank(3, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MemoryQueue(0, 3), ValueError, "^size: expected at least 1, got 0"),
        (lambda: MemoryQueue(2.0, 3), TypeError, "^size: expected an integer"),
        (lambda: MemoryQueue(2, True), TypeError, "^dim: expected an integer"),
        (lambda: MemoryQueue(2, 3, dtype=torch.int64), ValueError, "^dtype: expected float64"),
        (lambda: MemoryQueue(2, 3, dtype="float32"), TypeError, "^dtype: expected"),
        (lambda: MemoryQueue(2, 3, clusters=1), TypeError, "^clusters: expected True or False"),
        (lambda: MemoryBank(0, 3), ValueError, "^num_samples: expected"),
        (lambda: MemoryBank(2, 3, momentum=1.0), ValueError, "^momentum: expected"),
        (lambda: MemoryBank(2, 3, momentum=-0.1), ValueError, "^momentum: expected"),
        (lambda: MemoryBank(2, 3)[torch.tensor([2])], ValueError, "^indices: expected numbers from 0 to 1, got 2"),
        (lambda: MemoryBank(2, 3)[0], TypeError, "^indices: expected a tensor"),
        (lambda: MemoryQueue(2, 3).enqueue(torch.ones(1, 3, device="meta")), ValueError, "^embeddings: .* meta"),
    ],
)
def test_errors_name_the_argument(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_rows_of_a_bank_in_any_shape() -> None:
    bank = MemoryBank(5, 2)
    bank.update(torch.arange(5), batch(5, 2, 0))
    indices = torch.tensor([[0, 4, 4], [2, 1, 0]])
    assert torch.equal(bank[indices], bank.embeddings[indices])
