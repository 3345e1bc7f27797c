"""How contrasts are exchanged between processes: gathered at once, or passed along a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .distributed import MOST_BYTES_OF_ALL, World, all_gather, as_bytes, padded, reduce_scatter
from .ops.contrastive.blocks import Place, Visit


class Gathered:
    """Every process receives all contrasts: an all-gather of rows, and a reduce-scatter of their gradients.

    arrived: the rows of all processes, if they have been gathered already.
    """

    def __init__(self, world: World, sizes: list[int], arrived: Tensor | None = None) -> None:
        self.world, self.sizes, self.arrived = world, sizes, arrived
        self.total = sum(sizes)
        starts = [sum(sizes[:q]) for q in range(len(sizes))]
        self.places: list[Place] = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        self.own, self.processes = self.places[world.rank], world.size

    def walk(self, rows: Tensor, alone: bool, visit: Visit) -> Any:
        everyone = self._all_rows(rows)
        for place in self._places(alone):
            visit(place, None if alone and place == self.own else everyone[place])
        return everyone

    def _all_rows(self, rows: Tensor) -> Tensor:
        return self.world.all_rows(rows, self.sizes) if self.arrived is None else self.arrived

    def walk_back(self, kept: Any, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        gradients = self.gradients(kept, alone, visit, dtype)
        return None if gradients is None else self.summed(gradients)

    def gradients(self, kept: Any, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        if not alone:
            found = visit(slice(0, self.total), kept)
            if dtype is None:
                return None
            return torch.zeros_like(kept, dtype=dtype) if found is None else found
        gradients = None if dtype is None else torch.zeros_like(kept, dtype=dtype)
        for place in self._places(alone):
            found = visit(place, None if alone and place == self.own else kept[place])
            if gradients is not None and found is not None:
                gradients[place] = found
        return gradients

    def once(self, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        """`walk_back` without a walk before it."""
        return self.walk_back(self._all_rows(rows), rows, alone, visit, dtype)

    def _places(self, alone: bool) -> list[Place]:
        if not alone:
            return [slice(0, self.total)]
        return [slice(0, self.own.start), self.own, slice(self.own.stop, self.total)]

    def spread(self, values: Tensor) -> Tensor:
        return self.world.all_rows(values.movedim(-1, 0), self.sizes).movedim(0, -1).contiguous()

    def spread_rows(self, values: Sequence[Tensor]) -> list[Tensor]:
        pieces = [as_bytes(part) for part in values]
        arrived = self.world.all_rows(torch.cat(pieces, 1), self.sizes).split([part.shape[1] for part in pieces], 1)
        return [
            part.contiguous().view(like.dtype).reshape(-1, *like.shape[1:])
            for part, like in zip(arrived, values, strict=True)
        ]

    def collect(self, values: Tensor) -> Tensor:
        k, own = len(values), self.sizes[self.world.rank]
        sent = torch.cat([values[:, self.places[q]].reshape(-1) for q in range(self.world.size)])
        return self._traded(sent, [k * size for size in self.sizes]).view(self.world.size, k, own)

    def everyone(self, values: Tensor) -> Tensor:
        return all_gather(self.world.group, values).view(self.world.size, -1)

    def summed_with(self, values: Sequence[Tensor], number: Tensor) -> tuple[list[Tensor], Tensor]:
        rows = [part.flatten(1) if part.dim() > 1 else part[:, None] for part in values]
        numbers = number.reshape(1)
        if not rows or sum(part.numel() for part in rows) * number.itemsize > MOST_BYTES_OF_ALL:
            return [self.summed(part) for part in values], self.everyone(numbers)[:, 0]
        own, lengths = self.sizes[self.world.rank], [part.shape[1] for part in rows]
        sent = torch.cat([part for q in self.places for part in (*(of_all[q].flatten() for of_all in rows), numbers)])
        received = self._traded(sent, [sum(lengths) * size + 1 for size in self.sizes])
        sums = received[:, :-1].sum(0).split([own * length for length in lengths])
        shapes = [(own, *part.shape[1:]) for part in values]
        return [part.reshape(shape) for part, shape in zip(sums, shapes, strict=True)], received[:, -1]

    def _traded(self, sent: Tensor, lengths: list[int]) -> Tensor:
        """An all-to-all: sends `lengths[q]` numbers to process q; receives [processes, length of the own]."""
        size, own = self.world.size, lengths[self.world.rank]
        received = sent.new_empty(size * own)
        dist.all_to_all_single(received, sent, [own] * size, lengths, group=self.world.group)
        return received.view(size, own)

    def summed(self, values: Tensor) -> Tensor:
        most = max(self.sizes)
        if values.numel() == 0:
            return values[self.own]
        if values.device.type == "cpu":  # gloo would compute each sum on every process
            rows = values.flatten(1) if values.dim() > 1 else values[:, None]
            received = self._traded(rows.contiguous().view(-1), [rows.shape[1] * size for size in self.sizes])
            return received.sum(0).reshape(-1, *values.shape[1:])
        if min(self.sizes) < most:
            values = torch.cat([padded(values[self.places[q]], most) for q in range(self.world.size)])
        return reduce_scatter(self.world.group, values)[: self.sizes[self.world.rank]]


class Ring(Gathered):
    """Each process passes its current block to the next process while it computes on it; it holds two blocks."""

    def walk(self, rows: Tensor, alone: bool, visit: Visit) -> None:
        for q, block in self._passing(rows):
            visit(self.places[q], None if alone and q == self.world.rank else block)

    def walk_back(self, kept: Any, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        """A block's gradient follows the block, one step behind, and reaches its own process after the last step."""
        size = self.world.size
        width = rows.shape[1]
        home = None if dtype is None else rows.new_zeros(len(rows), width, dtype=dtype)
        arriving: tuple[Tensor, Callable[[], None]] | None = None
        for step, (q, block) in enumerate(self._passing(rows)):
            found = visit(self.places[q], None if alone and step == 0 else block)
            if home is None or dtype is None:
                continue
            if step == 0:
                if found is not None:
                    home += found
                continue
            gradient = rows.new_zeros(self.sizes[q], width, dtype=dtype) if found is None else found.contiguous()
            if arriving is not None:
                arriving[1]()
                gradient = gradient.add_(arriving[0])
            # The previous process sends the gradient of the block that arrives here next; in the last step, of this
            # process's own block.
            arriving = self._pass_on(gradient, rows.new_empty(self.sizes[(q - 1) % size], width, dtype=dtype))
        if home is not None and arriving is not None:
            arriving[1]()
            home += arriving[0]
        return home

    def once(self, rows: Tensor, alone: bool, visit: Visit, dtype: torch.dtype | None) -> Tensor | None:
        return self.walk_back(None, rows, alone, visit, dtype)

    def _passing(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rank and rows of each block: this process's own, then its predecessor's, and so on."""
        rank, size = self.world.rank, self.world.size
        block = rows.detach().resolve_neg().contiguous()
        for step in range(size):
            q = (rank - step) % size
            following = None
            if step + 1 < size:
                following = self._pass_on(block, rows.new_empty(self.sizes[(q - 1) % size], rows.shape[1]))
            yield q, block
            if following is not None:
                following[1]()
                block = following[0]

    def _pass_on(self, sent: Tensor, received: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Sends to the next process and receives from the previous one: the received tensor, and a function to wait."""
        world = self.world
        transfers = []
        if sent.numel():
            transfers.append(dist.P2POp(dist.isend, sent, self._peer(world.rank + 1), world.group))
        if received.numel():
            transfers.append(dist.P2POp(dist.irecv, received, self._peer(world.rank - 1), world.group))
        pending = dist.batch_isend_irecv(transfers) if transfers else []

        def wait() -> None:
            for transfer in pending:
                transfer.wait()
            transfers.clear()  # keeps the sent tensor alive until here

        return received, wait

    def _peer(self, rank: int) -> int:
        return dist.get_global_rank(self.world.group, rank % self.world.size)
