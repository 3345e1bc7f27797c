"""The state of queue and bank stays consistent when it is copied, loaded, averaged or changed in place."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcl import ClusterInfoNCE, MemoryBank, MemoryQueue, MoCoLoss, SampledNCELoss, knn_predict
from fastcl.memory_state import Memory
from tests.support.strategies import generator

SIZE, D = 7, 5


def rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, generator=generator(seed))


def made(kind: str) -> Memory:
    return MemoryQueue(SIZE, D, clusters=True, ids=True) if kind == "queue" else MemoryBank(SIZE, D)


def fill(memory: Memory, n: int, seed: int = 0) -> None:
    """The queue's next n rows, or the bank's first n."""
    clusters = torch.arange(n) + 100
    if isinstance(memory, MemoryQueue):
        memory.enqueue(rows(n, seed), clusters, torch.arange(n) + 200)
    else:
        memory.update(torch.arange(n), rows(n, seed), clusters)


def check_same(memory: Memory, other: Memory) -> None:
    """Both are equal now, and after further rows."""
    for step in range(3):
        assert len(memory) == len(other)
        for name in ("embeddings", "clusters", "ids"):
            assert torch.equal(getattr(memory, name), getattr(other, name)), name
        if step < 2:
            for one in (memory, other):
                fill(one, 3, seed=50 + step)


class Model(nn.Module):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.memory = memory


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)])
@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_an_averaged_model_has_the_models_memory(kind, average) -> None:
    """The average is made while the memory is empty; from then on torch copies the buffers."""
    model = Model(made(kind))
    averaged = AveragedModel(model, multi_avg_fn=average)
    for n in (4, 6):
        fill(model.memory, n)
        averaged.update_parameters(model)
    found = averaged.module.memory
    loss, z, labels = ClusterInfoNCE(0.1), rows(6, 1), torch.arange(6) % 3 + 100
    expected = loss(z, labels, contrasts=model.memory)
    assert expected > 0.1
    assert torch.equal(loss(z, labels, contrasts=found), expected)
    check_same(found, model.memory)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)])
def test_an_averaged_queue_can_be_used(average) -> None:
    """With use_buffers=True the rows are means over time, and their number is one that the queue has had."""
    model = Model(MemoryQueue(SIZE, D))
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for n, most in ((4, 4), (2, 6), (9, 7)):
        model.memory.enqueue(rows(n, n))
        averaged.update_parameters(model)
        queue = averaged.module.memory
        assert 4 <= len(queue) <= most
        assert queue.embeddings.shape == (len(queue), D)
        loss = MoCoLoss(0.1)(rows(3, 1), rows(3, 2), queue)
        query, key = (nn.functional.normalize(rows(3, seed).double(), dim=1) for seed in (1, 2))
        positive = (query * key).sum(1, keepdim=True) / 0.1
        logits = torch.cat([positive, query @ queue.embeddings.double().T / 0.1], 1)
        torch.testing.assert_close(loss.double(), (logits.logsumexp(1) - positive[:, 0]).mean(), rtol=1e-5, atol=0)
    queue.enqueue(rows(SIZE, 5))
    torch.testing.assert_close(queue.embeddings, nn.functional.normalize(rows(SIZE, 5), dim=1))


WRITES = {
    "buffer by buffer": lambda to, of: [b.copy_(a) for b, a in zip(to.buffers(), of.buffers(), strict=True)],
    "past autograd": lambda to, of: [b.data.copy_(a) for b, a in zip(to.buffers(), of.buffers(), strict=True)],
    "through state_dict": lambda to, of: [to.state_dict()[name].copy_(a) for name, a in of.state_dict().items()],
    "other data": lambda to, of: [setattr(getattr(to, name), "data", a.clone()) for name, a in of.named_buffers()],
    "other buffers": lambda to, of: [setattr(to, name, a.clone()) for name, a in of.named_buffers()],
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_whatever_writes_into_the_buffers_is_noticed(kind, write) -> None:
    memory, other = made(kind), made(kind)
    fill(memory, SIZE, seed=3)
    assert len(memory) == SIZE  # the memory now knows that it is full
    fill(other, 4)
    WRITES[write](memory, other)
    copied = copy.deepcopy(memory)  # copied before anything was read
    check_same(memory, other)
    check_same(pickle.loads(pickle.dumps(copied)), copied)


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value, for which the host waits on a GPU. Memories avoid them on a CPU too."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_queue_reads_its_counter_only_after_others_changed_it() -> None:
    queue, other = MemoryQueue(SIZE, D), MemoryQueue(SIZE, D)
    other.enqueue(rows(6, 0))
    with Reads() as reads:
        for n in (2, 3, 4):
            queue.enqueue(rows(n, n))
            assert len(queue) == min(2 + (n > 2) * 3 + (n > 3) * 4, SIZE)
            queue.stored(True)
        reads.count = 0
        queue.enqueue(rows(1, 1))
        assert (len(queue), queue.embeddings.shape, reads.count) == (SIZE, (SIZE, D), 0)
        for _ in range(2):
            queue.enqueued.copy_(other.enqueued)
            reads.count = 0
            assert len(queue) == 6
            assert reads.count > 0
            reads.count = 0
            assert [len(queue), len(queue.stored(True).rows), reads.count] == [6, 6, 0]
        clone = copy.deepcopy(queue)
        assert len(clone) == 6
        queue.reset()
        assert len(queue) == 0


def former_state(memory: Memory) -> dict[str, Tensor]:
    """The state as earlier versions with counters in Python saved it."""
    state = copy.deepcopy(memory.state_dict())
    counter = int(state.pop(memory.counter))
    numbers = [counter % SIZE, min(counter, SIZE)] if isinstance(memory, MemoryQueue) else [counter]
    return state | {"_extra_state": torch.tensor(numbers)}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("steps", [(), (4,), (4, 3), (4, 6), (6, 5, 6)])
@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_states_of_former_versions_load(kind, steps, assign) -> None:
    memory = made(kind)
    for n in steps:
        fill(memory, n, n)
    assert "_extra_state" not in memory.state_dict()
    for state in (former_state(memory), former_state(memory) | copy.deepcopy(memory.state_dict())):
        fresh = made(kind)
        fill(fresh, 2, 9)
        fresh.load_state_dict(copy.deepcopy(state), strict=True, assign=assign)
        check_same(fresh, copy.deepcopy(memory))
        whole = Model(made(kind))
        prefixed = {f"memory.{name}": value for name, value in state.items()}
        whole.load_state_dict(whole.encoder.state_dict(prefix="encoder.") | prefixed, strict=True, assign=assign)
        check_same(whole.memory, copy.deepcopy(memory))


@pytest.mark.parametrize(("kind", "value"), [("queue", -1), ("bank", 2), ("bank", -1)])
def test_counters_that_cannot_be_are_refused(kind, value) -> None:
    memory, other = made(kind), made(kind)
    fill(memory, 4, 1)
    fill(other, 5, 2)
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises(RuntimeError, match=f"{memory.counter}: expected a counter of this memory, got {value}"):
        memory.load_state_dict(other.state_dict() | {memory.counter: torch.tensor(value)})
    state = other.state_dict()
    del state[memory.counter]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{memory.counter}"'):
        memory.load_state_dict(state)
    for name, kept in memory.state_dict().items():
        assert torch.equal(kept, before[name])


@pytest.mark.parametrize(
    "how",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu"), lambda m: m.double()],
)
@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_copies_and_casts_keep_all(kind, how) -> None:
    memory = made(kind)
    fill(memory, SIZE, 1)
    fill(memory, 3, 2)
    before = copy.deepcopy(memory)
    found = how(memory)
    found.rows = found.rows.float()
    check_same(copy.deepcopy(found), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_half_precision_rounds_rows_alone(kind, dtype) -> None:
    memory = made(kind)
    fill(memory, 5)
    rounded = copy.deepcopy(memory).to(dtype)
    for name, value in memory.state_dict().items():
        expected = value.to(dtype) if name == "rows" else value
        assert torch.equal(rounded.state_dict()[name], expected)
        assert rounded.state_dict()[name].dtype == expected.dtype
    assert len(rounded) == 5


@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_a_memory_made_on_meta_is_empty_where_it_is_put(kind) -> None:
    with torch.device("meta"):
        model = Model(made(kind))
    assert "MemoryQueue" in repr(made("queue").to("meta"))
    check_same(model.to_empty(device="cpu").memory, made(kind))


@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_reset_empties(kind) -> None:
    memory = made(kind)
    fill(memory, SIZE)
    fill(memory, 3)
    assert len(memory) == SIZE
    memory.reset()
    assert len(memory) == 0
    for name, value in made(kind).state_dict().items():
        assert torch.equal(memory.state_dict()[name], value), name
    check_same(memory, made(kind))
    if kind == "bank":  # and clusters that were never given are the indices again
        memory.reset()
        memory.update(torch.tensor([4]), rows(1, 0))
        assert memory.clusters.tolist() == [4]


@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_a_call_that_raises_changes_nothing(kind) -> None:
    """4-bit integers are no ids: whichever check finds out, nothing has been written by then."""
    memory = made(kind)
    fill(memory, 4)
    before = copy.deepcopy(memory.state_dict())
    z, ids, bad = rows(3, 1), torch.arange(3), torch.zeros(3, dtype=torch.uint4)
    with pytest.raises((TypeError, NotImplementedError)):
        _ = memory.enqueue(z, ids, bad) if kind == "queue" else memory.update(ids, z, bad)
    for name, kept in memory.state_dict().items():
        assert torch.equal(kept, before[name])


def test_threads_get_places_of_their_own() -> None:
    threads, steps, batch = 16, 40, 3
    queue = MemoryQueue(threads * steps * batch, 2, ids=True)

    def work(thread: int) -> None:
        for step in range(steps):
            ids = (thread * steps + step) * batch + torch.arange(batch)
            queue.enqueue(torch.stack([torch.ones(batch), ids.float()], 1), ids=ids)

    running = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(queue) == queue.size
    assert torch.equal(queue.ids.sort().values, torch.arange(queue.size))
    torch.testing.assert_close(queue.rows[:, 1] / queue.rows[:, 0], queue.sample_ids.float())


def test_a_compiled_step_with_its_enqueue() -> None:
    """A queue whose length is a multiple of the batch returns to the same places: then nothing is compiled again."""
    loss, queue = MoCoLoss(), MemoryQueue(6, D)
    queue.enqueue(rows(6, 0))
    plain = copy.deepcopy(queue)

    def step(memory: MemoryQueue, query: Tensor, key: Tensor) -> Tensor:
        found = loss(query, key, memory)
        memory.enqueue(key)
        return found

    compiled = torch.compile(lambda query, key: step(queue, query, key), fullgraph=True, backend="aot_eager")
    for k in range(5):
        query, key = rows(3, k), rows(3, k + 10)
        with torch.compiler.set_stance("fail_on_recompile" if k > 2 else "default"):
            torch.testing.assert_close(compiled(query, key), step(plain, query, key))
    torch.testing.assert_close(queue.embeddings, plain.embeddings)
    assert queue.enqueued.item() == plain.enqueued.item() == 21
    queue.enqueued.fill_(4)
    assert len(queue) == 4  # reading it outside makes the change known to the graph
    expected = loss(query, key, queue.rows[:4])
    torch.testing.assert_close(compiled(query, key), expected)


def test_a_label_below_zero() -> None:
    labels = torch.tensor([0, -1, 2])
    with pytest.raises(ValueError, match=r"^labels: expected numbers of at least 0, got -1"):
        knn_predict(rows(2, 0), rows(3, 1), labels, k=2)
    with pytest.raises(ValueError, match=r"^labels: expected numbers from 0 to 2, got -1"):
        knn_predict(rows(2, 0), rows(3, 1), labels, k=2, num_classes=3)


def test_sampled_loss_of_a_bank_that_was_copied_into() -> None:
    """Negatives are drawn from the rows that are there at the time of the call."""
    bank, other = MemoryBank(SIZE, D), MemoryBank(SIZE, D)
    other.update(torch.arange(SIZE), rows(SIZE, 0))
    WRITES["buffer by buffer"](bank, other)
    loss = SampledNCELoss(num_negatives=3, log_normalizer=1.0)
    found = [loss(rows(4, 1), torch.arange(4), memory, generator=generator(0)) for memory in (bank, other)]
    assert torch.equal(*found)
