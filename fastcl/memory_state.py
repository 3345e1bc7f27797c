"""The state of a memory: rows and a counter that travel together, and how a state is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels.checks import check_device, check_rows


class Stored(NamedTuple):
    """Rows of a memory as a loss takes them: without gradient, normalised already."""

    rows: Tensor  # [M, D]
    clusters: Tensor | None  # [M] int64, -1: none; None: the memory keeps none
    ids: Tensor | None  # [M] int64, -1: none
    clustered: bool  # clusters came from the user, who has to name the anchors' too


class Memory(nn.Module):
    """What queue and bank share: rows that are state, and a loss's view of them.

    One counter says which rows hold something. It is a buffer, so that it travels with the rows wherever buffers do
    (state_dict, DistributedDataParallel, averaged models). A copy of it in Python saves losses from waiting for a GPU:
    there the buffer is read again only after something else has changed it. Threads take turns to change rows and
    counter, so that no place is given away twice.
    """

    rows: Tensor
    counter = ""  # the name of that buffer, int64 []
    former_counters = 0  # how many numbers versions before it kept in `_extra_state` instead
    _value = 0  # the copy
    _seen: tuple[Tensor, int, int] | None = None  # the state of the buffer that the copy was taken from

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()

    def stored(self, kept: bool) -> Stored:
        """The valid rows. kept: a backward will want them again, so that they must outlive changes of the memory."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def _check_embeddings(self, embeddings: Any) -> None:
        check_rows("embeddings", embeddings)
        if embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings: expected rows of dimension {self.dim}, got shape {list(embeddings.shape)}")
        check_device("embeddings", embeddings, self.rows.device)

    def _refresh(self) -> None:
        """Takes over what has been written into the counter since, by a load, a broadcast, an average."""
        if torch.compiler.is_compiling():
            return  # the copy is a constant of the graph
        counter = self._buffers[self.counter]
        if counter is None or unchanged(counter, self._seen):
            return
        self.__dict__["_seen"] = buffer_state(counter)
        if counter.item() != self._value:
            with self._lock:  # as another thread may be changing both
                self._take(int(counter.item()))

    def _alone(self) -> AbstractContextManager[Any]:
        """Until its end no other thread changes the memory. Compiled code knows no locks."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def _take(self, value: int) -> None:
        """The counter's value as a copy in Python."""
        self._value = value

    def _count_on(self, by: int) -> None:
        """Raises the counter, without waiting for a device. What `_take` sets is for the caller to change."""
        counter = self._buffers[self.counter]
        assert counter is not None
        if torch.compiler.is_compiling():  # the value, read here, would be a constant of the graph
            counter.add_(by)
            return
        # Past nn.Module's __setattr__, which takes longer than the operation.
        self.__dict__["_value"] = value = self._value + by
        counter.fill_(value)
        self.__dict__["_seen"] = buffer_state(counter)

    def _count_from_zero(self) -> None:
        getattr(self, self.counter).zero_()
        self._seen = None
        self._take(0)

    def reset(self) -> None:
        """Empties the memory."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Memory:
        without_content = self.rows.is_meta
        super()._apply(fn, recurse)
        if without_content and not self.rows.is_meta:  # `to_empty`: buffers hold what lay in the memory before
            self.reset()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other buffers, whose states may look like those that were seen of these, and a lock of its own.
        left = ("_lock", "_seen", "_filled_seen")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    # Loading a state is all or nothing: where something is missing or does not fit, none of this module's tensors is
    # copied and no counter changes. Superfluous keys are for torch to report, which alone knows of strict=False.

    def _valid(self, value: int) -> bool:
        """Whether the counter can have this value."""
        raise NotImplementedError

    def _of_former(self, counters: list[int]) -> int | None:
        """The counter's value for the counters of former versions; None if no memory can have them."""
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        kept = {k: v for k, v in self._buffers.items() if k not in self._non_persistent_buffers_set}
        own = {prefix + name: value for name, value in (self._parameters | kept).items() if value is not None}
        state_dict, message = self._with_counter(state_dict, prefix)
        absent = [key for key in own if key not in state_dict]
        wrong = [message, *(_misfit(key, state_dict[key], like) for key, like in own.items() if key in state_dict)]
        if local_metadata.get("assign_to_params_buffers", False):
            places = {prefix + name: value for name, value in kept.items() if value is not None}
            wrong += [_unassignable(key, state_dict[key], like) for key, like in places.items() if key in state_dict]
        if absent or any(wrong):
            missing_keys += absent
            error_msgs += [message for message in wrong if message]
            for key in state_dict:
                known = key in own or key[len(prefix) :].split(".")[0] in self._modules
                if key.startswith(prefix) and not known:
                    unexpected_keys.append(key)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._seen = None
        self._refresh()

    def _with_counter(self, state_dict: Mapping[str, Any], prefix: str) -> tuple[Mapping[str, Any], str]:
        """The state with the counter as a tensor, also that of a former version, and what is wrong with it."""
        key, former = prefix + self.counter, prefix + "_extra_state"
        value = state_dict.get(key)
        if isinstance(value, Tensor) and value.shape == () and _kind(value) == "integers":
            readable = type(value) is Tensor and not value.is_meta
            if readable and not self._valid(int(value)):
                return state_dict, f"{key}: expected a counter of this memory, got {int(value)}"
        if former not in state_dict or type(self).set_extra_state is not nn.Module.set_extra_state:
            return state_dict, ""
        counters, count = state_dict[former], self.former_counters
        if not isinstance(counters, Tensor) or counters.shape != (count,) or _kind(counters) != "integers":
            return state_dict, f"{former}: expected a tensor of {count} integers, got {counters!r}"
        found = self._of_former([int(number) for number in counters])
        if found is None:
            return state_dict, f"{former}: expected counters of this memory, got {counters.tolist()}"
        state = {name: entry for name, entry in state_dict.items() if name != former}
        if key not in state:
            rows = state.get(prefix + "rows")
            device = rows.device if isinstance(rows, Tensor) else None
            state[key] = torch.tensor(found, dtype=torch.int64, device=device)
        return state, ""


def buffer_state(buffer: Tensor) -> tuple[Tensor, int, int] | None:
    """What changes with every change of a buffer that torch knows of; None: torch keeps no account of this one."""
    if type(buffer) is not Tensor or buffer.is_inference():
        return None
    return buffer, buffer.data_ptr(), buffer._version


def unchanged(buffer: Tensor, seen: tuple[Tensor, int, int] | None) -> bool:
    """Whether a buffer is still in the state `seen`, or has no values.

    On the CPU reading it is as quick, so nothing counts as unchanged, and writes through `.data` are noticed too. Under
    a dispatch mode, which may forbid to read, states are compared there as well.
    """
    if type(buffer) is not Tensor or buffer.is_meta:
        return True
    if buffer.is_cpu and torch._C._len_torch_dispatch_stack() == 0:
        return False
    if seen is None or seen[0] is not buffer or buffer.is_inference():
        return False
    return seen[1:] == (buffer.data_ptr(), buffer._version)


def _misfit(key: str, value: Any, like: Tensor) -> str:
    """Why a value cannot take the place of `like`, nothing if it can."""
    if not isinstance(value, Tensor):
        return f"{key}: expected a tensor, got {type(value).__name__}"
    if value.shape != like.shape:
        return f"{key}: expected shape {list(like.shape)}, got {list(value.shape)}"
    return "" if _kind(value) == _kind(like) else f"{key}: expected {_kind(like)}, got {value.dtype}"


def _unassignable(key: str, value: Any, like: Tensor) -> str:
    """Why a value cannot become the place into which later rows are written, nothing if it can (``assign=True``)."""
    if not isinstance(value, Tensor) or value.shape != like.shape or _kind(value) != _kind(like):
        return ""  # that has been said
    if value.dtype == like.dtype and value.is_contiguous() and not value.requires_grad:
        return ""
    what = f"{value.dtype}" + ", requiring a gradient" * value.requires_grad + ", strided" * (not value.is_contiguous())
    return f"{key}: with assign=True expected {like.dtype} in one piece, without gradient, got {what}"


def _kind(values: Tensor) -> str:
    if values.dtype == torch.bool:
        return "truth values"
    if values.is_complex():
        return "complex numbers"
    return "floating numbers" if values.is_floating_point() else "integers"
