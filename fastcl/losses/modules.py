"""Shared by the modules of losses: buffers that keep their dtype, numbers in `extra_repr`, plain reductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class ExactModule(nn.Module):
    """A module whose own buffers move between devices with it but keep their dtype.

    `.half()`, `.to(dtype)` and a loaded state would round such buffers, for instance the masses of a prior. Parameters
    are cast as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactModule:
        exact = {id(buffer) for buffer in self._buffers.values() if buffer is not None}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in exact:
                return fn(tensor)
            try:
                found = fn(tensor)
            except TypeError:  # a device without float64 (MPS)
                return fn(tensor.float())
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *reports: Any
    ) -> None:
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *reports)
        for name, dtype in dtypes.items():  # with assign=True the buffer is the state's tensor
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype != dtype:
                self._buffers[name] = buffer.to(dtype)


class GroupModule(nn.Module):
    """A module with a process group, which copies and pickles leave behind: they belong to other processes."""

    group: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}


def shown_temperature(temperature: float | Tensor) -> str:
    """The temperature for `extra_repr`."""
    return shown_number("temperature", temperature)


def shown_number(name: str, value: float | Tensor) -> str:
    """``name=value`` for `extra_repr`. Only plain tensors are read: others are sharded or have no values."""
    learned = " (learned)" if isinstance(value, Parameter) else ""
    if isinstance(value, Tensor):
        if value.is_meta:
            return f"{name}=meta{learned}"
        if type(value.data) is not Tensor or value.numel() != 1:
            return f"{name}={type(value.data).__name__}{learned}"
        value = value.detach().item()
    return f"{name}={value:g}{learned}"


def loss_dtype(embeddings: Tensor) -> torch.dtype:
    """The dtype of a loss: float64 for float64 embeddings, else float32."""
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


def reduced(terms: Tensor, reduction: str, embeddings: Tensor) -> Tensor:
    """The terms [N] reduced over all rows, whether or not they have contrasts; the mean of no rows is 0."""
    terms = terms.to(loss_dtype(embeddings))
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.sum() / max(terms.shape[0], 1)
