"""What the processes of test_cached.py run: steps of two towers with a learned temperature."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastcl
from fastcl import CachedStep, cached_step

F64 = torch.float64
MODES = (True, "ring")
SHARES = (slice(0, 5), slice(5, 12))  # samples of each process


class Tower(nn.Module):
    def __init__(self, width: int, temperature: bool = False) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.layers = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 4)).to(F64)
        if temperature:
            self.temperature = nn.Parameter(torch.full((1,), 0.3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.layers(x)
        return rows


class Loss(nn.Module):
    """A loss with its own temperature."""

    def __init__(self, gather: Any) -> None:
        super().__init__()
        temperature = nn.Parameter(torch.full((1,), 0.3, dtype=F64))
        self.loss = fastcl.ClusterInfoNCE(temperature, symmetric=True, gather=gather)

    def forward(self, x: Tensor, y: Tensor, temperature: Tensor | None = None) -> Tensor:
        loss: Tensor = self.loss(x, contrasts=y, temperature=temperature)
        return loss


class Towers(nn.Module):
    """Two encoders and a loss."""

    def __init__(self, gather: Any) -> None:
        super().__init__()
        self.left, self.right = Tower(5), Tower(3)
        self.criterion = Loss(gather)


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(12, 5, dtype=F64, generator=g), torch.randn(12, 3, dtype=F64, generator=g)


def plain(model: Towers, given: tuple[Tensor, Tensor]) -> Towers:
    model.criterion(model.left(given[0]), model.right(given[1])).backward()
    return model


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by the names that they have in `Towers`."""
    return {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _whole(value: Tensor | None) -> Tensor:
    assert value is not None
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def wrapped(rank: int) -> dict[tuple[str, bool, Any], dict[str, Tensor]]:
    """A temperature inside of an encoder that is wrapped, in a criterion that is wrapped, and in the module form."""
    given = tuple(part[SHARES[rank]] for part in data())
    results = {}
    for unused in (False, True):
        for mode in MODES:
            left, right, loss = Tower(5, temperature=True), Tower(3), Loss(mode)
            loss.requires_grad_(False)  # the temperature of the left tower is used
            a, b = (DistributedDataParallel(tower, find_unused_parameters=unused) for tower in (left, right))
            for size in (2, 3) if mode is True else (3,):  # 3 and 4 chunks, or 2 and 3
                for tower in (left, right):
                    tower.zero_grad()
                criterion = lambda x, y: loss(x, y, left.temperature)  # noqa: B023, E731
                cached_step((a, b), given, criterion, chunk_size=size)
            results["inside", unused, mode] = {
                **{f"left.{name}": _whole(p.grad) for name, p in left.named_parameters() if name != "temperature"},
                **{f"right.{name}": _whole(p.grad) for name, p in right.named_parameters()},
                "criterion.loss.temperature": _whole(left.temperature.grad),
            }
            model = Towers(mode)
            parts = [
                DistributedDataParallel(part, find_unused_parameters=unused)
                for part in (model.left, model.right, model.criterion)
            ]
            cached_step(tuple(parts[:2]), given, parts[2], chunk_size=3)
            results["beside", unused, mode] = gradients_of(model)
            model = Towers(mode)
            form = CachedStep((model.left, model.right), model.criterion, chunk_size=2)
            outer = DistributedDataParallel(form, find_unused_parameters=unused)
            outer(given).backward()
            results["own", unused, mode] = gradients_of(model)
    return results


def accumulated(rank: int) -> dict[str, dict[str, Tensor]]:
    """Two batches, of which the first is not synchronised."""
    given = tuple(part[SHARES[rank]] for part in data())
    results = {}
    for way in ("sync=False", "no_sync", "module"):
        model = Towers(True)
        if way == "module":
            form = DistributedDataParallel(CachedStep((model.left, model.right), model.criterion, chunk_size=2))
            with form.no_sync():
                form(given).backward()
            form(given).backward()
        else:
            a, b, c = (DistributedDataParallel(part) for part in (model.left, model.right, model.criterion))
            with c.no_sync():
                if way == "no_sync":
                    with a.no_sync(), b.no_sync():
                        cached_step((a, b), given, c, chunk_size=2)
                else:
                    cached_step((a, b), given, c, chunk_size=2, sync=False)
            cached_step((a, b), given, c, chunk_size=2)
        results[way] = gradients_of(model)
    return results


def reductions(rank: int) -> dict[str, int]:
    """The number of gradient buckets that DDP reduces in a step of one wrapped model for both inputs."""
    x = data()[0][SHARES[rank]]
    count = 0

    def counted(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal count
        count += 1
        return allreduce_hook(None, bucket)

    model = DistributedDataParallel(Tower(5))
    model.register_comm_hook(None, counted)
    criterion = Loss(True).requires_grad_(False)
    results = {}
    for way in ("plain", "cached"):
        count = 0
        if way == "plain":
            criterion(*model(torch.cat([x, x * 2])).split(len(x))).backward()
        else:
            cached_step(model, (x, x * 2), criterion, chunk_size=2)
        results[way] = count
    return results


def sharded(rank: int) -> dict[str, Tensor]:
    """FSDP2: encoders and criterion are sharded, each process has as many chunks as the other."""
    given = tuple(part[SHARES[rank]] for part in data())
    model = Towers(True)
    for part in (model.left.layers[0], model.left, model.right, model.criterion):
        fully_shard(part)
    size = -(-len(given[0]) // 3)
    for _ in range(2):  # the second step starts from a state as the first left it
        model.zero_grad()
        cached_step((model.left, model.right), given, model.criterion, chunk_size=size)
    return gradients_of(model)


class Remembering(nn.Module):
    """An encoder, a queue, a bank, and a learned temperature of a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Tower(5)
        self.queue = fastcl.MemoryQueue(8, 4, dtype=F64)
        self.bank = fastcl.MemoryBank(12, 4, dtype=F64)
        temperature = nn.Parameter(torch.full((1,), 0.3, dtype=F64))
        self.loss = fastcl.MoCoLoss(temperature, gather=True)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.encoder(x), self.encoder(x * 1.5).detach()
        loss: Tensor = self.loss(query, key, self.queue)
        return loss


def stepped(model: Remembering, rank: int | None) -> Remembering:
    """Two steps of SGD; queue and bank hold the rows of all processes. rank None: in one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = data()[0]
    mine = x if rank is None else x[SHARES[rank]]
    places = torch.arange(12) if rank is None else torch.arange(12)[SHARES[rank]]
    for _ in range(2):
        optimizer.zero_grad()
        model(mine).backward()
        optimizer.step()
        with torch.no_grad():
            rows, indices = fastcl.distributed.gather_rows(model.encoder(mine), places)
        model.queue.enqueue(rows)
        model.bank.update(indices, rows)
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in model.state_dict().items()
    }


def remembering(rank: int) -> dict[str, Any]:
    """FSDP2 shards encoder and loss; a checkpoint of all processes goes into a new model."""
    model = Remembering()
    fully_shard(model.encoder)
    fully_shard(model.loss)
    stepped(model, rank)
    with tempfile.TemporaryDirectory() as folder:
        shared: list[Any] = [folder]
        dist.broadcast_object_list(shared)
        checkpoint.save(model.state_dict(), checkpoint_id=shared[0])
        other = Remembering()
        for parameter in other.parameters():
            parameter.data.zero_()
        fully_shard(other.encoder)
        fully_shard(other.loss)
        state = other.state_dict()
        checkpoint.load(state, checkpoint_id=shared[0])
        other.load_state_dict(state)
        dist.barrier()
    return {
        "state": state_of(model), "loaded": state_of(other), "lengths": (len(other.queue), len(other.bank)),
        "losses": [float(part(data()[0][SHARES[rank]])) for part in (model, other)],
    }  # fmt: skip


def refused(rank: int) -> str:
    try:
        CachedStep(DistributedDataParallel(Tower(5)), nn.Identity(), chunk_size=2)
    except ValueError as error:
        return str(error)
    return ""


def everything(rank: int, world: int) -> dict[str, Any]:
    return {work.__name__: work(rank) for work in (wrapped, accumulated, reductions, sharded, remembering, refused)}
