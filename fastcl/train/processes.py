"""One run by several processes, as torchrun starts them: each has its share of every batch, the first does the rest."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from fastcl.train import OptionError


class Processes(NamedTuple):
    """This process among those of a run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and measures."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device that --device means here: of several GPUs the process's own."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and self.size > 1 else name

    def share(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the batch's images those of this process, in their order."""
        return np.array_split(index, self.size)[self.rank]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, in all of them; an `OptionError` there is one everywhere."""
        if self.size == 1:
            return make()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = make()
            except OptionError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise OptionError(found[1])
        return found[0]

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients become their mean over processes, as DistributedDataParallel makes them."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([len(g.flatten()) for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def mean(self, loss: Tensor) -> float:
        """Of the processes' losses."""
        value = loss.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return float(value) / self.size

    def gathering(self, method: nn.Module) -> None:
        """Its losses are from now on those of all processes' rows; OptionError where a layer's statistics are not."""
        if self.size == 1:
            return
        for module in method.modules():
            if hasattr(module, "gather"):
                module.gather = True  # type: ignore[assignment]
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise OptionError(
                    "--method must be one with the BatchNorm of fastcl.train.methods.normalisation to run in several "
                    f"processes; the statistics of {type(module).__name__} would be each process's own"
                )


@contextmanager
def started() -> Iterator[Processes]:
    """The process group that torchrun's environment describes; without it, or for one process, none is made."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(rank=rank, world_size=size)  # gloo, and NCCL for tensors on GPUs
    try:
        yield Processes(rank, size)
        dist.barrier()  # no process leaves while another one still needs it
    finally:
        dist.destroy_process_group()
