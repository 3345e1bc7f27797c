"""A loss of several prefixes of the embeddings, so that their first numbers alone are embeddings too."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, finite_number
from ..memory_state import Memory
from ..ops.backends.rows import unit, unit_rows
from .cluster import ClusterInfoNCE
from .options import options_of
from .prefixes import one_sweep

# Arguments of losses that are no rows, although they may be matrices.
NO_ROWS = ("assignments", "contrast_assignments", "guide", "weights", "contrast_bias", "logit_scale", "temperature")


class MatryoshkaLoss(nn.Module):
    r"""Matryoshka representation learning: a weighted sum of a loss of the first d numbers of each row.

    .. math:: \sum_{k} w_k \, L\big(\hat x_{:d_k}\big)

    Each prefix is normalised anew. ``MatryoshkaLoss(ClusterInfoNCE(), dims=(64, 128, 256, 512))(z, clusters)`` takes
    the arguments of the loss that it holds::

        loss = MatryoshkaLoss(fastcl.ClipLoss(), dims=(64, 128))
        loss(image, text, logit_scale).backward()

    Args:
        criterion: a module or function: any loss of this library, or another one. Called once for each of the dims,
            unless one sweep computes all (docs/large_batches.md); with ``gather`` each of them has its own exchanges.
        dims: the lengths of prefixes, at least one, each >= 1 and at most that of the rows. In any order.
        weights: a finite number >= 0 for each of the dims; None: 1 each.

    ``forward(*args, **kwargs)``: the first argument is a tensor of rows ``[..., D]``. Every floating tensor with at
    least two dimensions of which the last is D is cut, also in lists and tuples, and so are the rows of queues and
    banks; all other arguments are passed on. Arguments called ``assignments``, ``contrast_assignments`` or ``guide``
    are no rows. Stored rows have no gradient.

    Returns:
        The weighted sum of what the criterion returns: of a scalar, or of a tensor with ``reduction="none"``. If it
        returns a tuple, as with ``return_stats=True``, the sum of the first entries, and a dictionary of the others by
        dim.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Kusupati et al., "Matryoshka representation learning" (2022).
    """

    def __init__(
        self,
        criterion: Callable[..., Any],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not callable(criterion):
            raise TypeError(f"criterion: expected a module or function, got {type(criterion).__name__}")
        self.criterion = criterion
        if isinstance(dims, (str, Tensor)) or not isinstance(dims, Sequence):
            raise TypeError(f"dims: expected a list or tuple of integers, got {type(dims).__name__}")
        if not dims:
            raise ValueError("dims: expected at least one, got none")
        self.dims = tuple(check_count("dims", d) for d in dims)
        if len(set(self.dims)) < len(self.dims):
            raise ValueError(f"dims: expected different numbers, got {list(self.dims)}")
        if weights is None:
            weights = (1.0,) * len(self.dims)
        if isinstance(weights, (str, Tensor)) or not isinstance(weights, Sequence):
            raise TypeError(f"weights: expected a list or tuple of numbers, got {type(weights).__name__}")
        if len(weights) != len(self.dims):
            raise ValueError(
                f"weights: expected {len(self.dims)} numbers, one for each of the dims, got {len(weights)}"
            )
        self.weights = tuple(finite_number("weights", weight) for weight in weights)
        if min(self.weights) < 0:
            raise ValueError(f"weights: expected numbers of at least 0, got {min(self.weights)}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The weighted sum. The class describes the arguments."""
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(first, Tensor) or first.dim() < 2:
            got = f"shape {list(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
            raise TypeError(f"embeddings: expected a tensor of rows [..., D] as the first argument, got {got}")
        width = first.shape[-1]
        if max(self.dims) > width:
            raise ValueError(f"dims: expected numbers of at most {width}, the length of the rows, got {max(self.dims)}")
        found = self._one_sweep(args, kwargs)
        if found is not None:
            return found
        names = self._names(len(args))
        total, others = None, {}
        for d, weight in zip(self.dims, self.weights, strict=True):
            cut = _Prefix(d, width, getattr(self.criterion, "normalize", False) is True)
            given = [value if name in NO_ROWS else cut(value) for name, value in zip(names, args, strict=True)]
            named = {name: value if name in NO_ROWS else cut(value) for name, value in kwargs.items()}
            found = self.criterion(*given, **named)
            if isinstance(found, tuple):
                found, *rest = found
                others[d] = rest[0] if len(rest) == 1 else tuple(rest)
            if not isinstance(found, Tensor):
                raise TypeError(f"criterion: expected to return a tensor or a tuple, got {type(found).__name__}")
            total = found * weight if total is None else total + found * weight
        return (total, others) if others else total

    def _one_sweep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The loss of all dims from one sweep, where `prefixes.one_sweep` takes the call."""
        loss = self.criterion
        if torch.compiler.is_compiling() or type(loss) is not ClusterInfoNCE or _is_hooked(loss):
            return None
        given = dict(zip(("embeddings",), args, strict=False)) | kwargs
        if len(args) > 1 or not {"embeddings", "contrasts"} <= given.keys() <= {
            "embeddings",
            "contrasts",
            "temperature",
        }:
            return None
        temperature = given.get("temperature")
        temperature = loss.temperature if temperature is None else temperature
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float, Tensor)):
            return None
        return one_sweep(
            options_of(loss), temperature, given["embeddings"], given["contrasts"], self.dims, self.weights
        )

    def _names(self, count: int) -> list[str]:
        """The names of the criterion's first arguments; "" where it has none."""
        call = self.criterion.forward if isinstance(self.criterion, nn.Module) else self.criterion
        try:
            found = list(inspect.signature(call).parameters)
        except (TypeError, ValueError):  # a function in C
            found = []
        return (found + [""] * count)[:count]

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, weights={list(self.weights)}"


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook expects a call for each prefix."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class _Prefix:
    """Cuts rows of a width to their first d numbers."""

    def __init__(self, d: int, width: int, normalised_later: bool) -> None:
        self.d, self.width, self.normalised_later = d, width, normalised_later

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([self(part) for part in value]) if type(value) in (list, tuple) else value
        if isinstance(value, Memory):
            return value if value.dim != self.width else self._memory(value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return value
        if value.shape[-1] != self.width:
            return value
        rows = value[..., : self.d]
        if self.normalised_later:
            return rows
        return unit(rows.reshape(-1, self.d)).unflatten(0, rows.shape[:-1])

    def _memory(self, memory: Memory) -> Memory:
        """A memory of the prefixes, to read only."""
        memory._refresh()
        view = copy.copy(memory)
        rows = unit_rows(memory.rows[:, : self.d], memory.rows.dtype).to(memory.rows.dtype)
        view.__dict__["_buffers"] = {**memory._buffers, "rows": rows}
        view.__dict__["_seen"] = memory._seen
        return view
