"""The state of a memory: rows and a counter in buffers, and how a state is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_count, check_device, check_ids, check_rows
from .tags import WORD, check_tags, packed, words_for

ADDRESS_SPACE = 2**47  # bytes that a process can address on x86-64


class Stored(NamedTuple):
    """The valid rows of a memory for a loss: without gradient, already normalised."""

    rows: Tensor  # [M, D]
    clusters: Tensor | None  # [M] int64, -1: none; None: the memory stores no clusters, or tags in place of them
    ids: Tensor | None  # [M] int64, -1: none
    clustered: bool  # whether the user gave clusters or tags; the loss then requires those of the anchors
    tags: Tensor | None = None  # [M, W] int64, packed
    tag_count: int = 0  # T


class Memory(nn.Module):
    """Base class of queue and bank: stored rows, their counter, and how a loss reads them.

    A counter tells which rows are valid. It is a buffer, so it is copied together with the rows wherever buffers are
    (state_dict, DistributedDataParallel, averaged models). Python keeps a copy of it, so that losses do not wait for a
    GPU: on a GPU the buffer is read again only after something else has changed it. A lock makes threads take turns to
    change rows and counter, so that no slot is used twice.
    """

    rows: Tensor
    cluster_ids: Tensor | None  # [size] int64, -1: none
    tag_words: Tensor | None  # [size, W] int64: packed tags in place of clusters
    tag_count = 0  # T
    counter = ""  # name of the counter's buffer, int64 []
    former_counters = 0  # length of `_extra_state`, which earlier versions saved instead of the counter
    _value = 0  # Python's copy of the counter
    _seen: tuple[Tensor, int, int] | None = None  # the state of the buffer when the copy was made

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()

    def stored(self, kept: bool) -> Stored:
        """The valid rows. kept: a backward needs them, so they must not change with the memory."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def _store_clusters(self, size: int, clusters: bool, tags: Any) -> None:
        """Registers the buffers of clusters, or of tags in place of them; tags: None or their number, unchecked."""
        words = None
        if tags is not None:
            self.tag_count = check_count("tags", tags, most=8 * ADDRESS_SPACE // size)
            words = torch.zeros(size, words_for(self.tag_count), dtype=torch.int64)
        ids = torch.full((size,), -1, dtype=torch.int64) if clusters and tags is None else None
        self.register_buffer("cluster_ids", ids)
        self.register_buffer("tag_words", words)

    @property
    def _cluster_place(self) -> Tensor | None:
        """The buffer that clusters or tags go to."""
        return self.cluster_ids if self.tag_words is None else self.tag_words

    def _clusters_of(self, values: Any, count: int) -> Tensor:
        """Checked clusters or tags of `count` rows, as they are stored."""
        if self.tag_words is not None:
            check_tags("clusters", values, count, self.rows.device, self.tag_count)
            return packed(values)
        check_ids("clusters", values, count, self.rows.device)
        found: Tensor = values.to(torch.int64).clamp(min=-1)
        return found

    def _remove_clusters(self) -> None:
        if (place := self._cluster_place) is not None:
            place.fill_(0 if place is self.tag_words else -1)

    def _shown_tags(self) -> str:
        return f", tags={self.tag_count}" if self.tag_count else ""

    def _check_embeddings(self, embeddings: Any) -> None:
        check_rows("embeddings", embeddings)
        if embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings: expected rows of dimension {self.dim}, got shape {list(embeddings.shape)}")
        check_device("embeddings", embeddings, self.rows.device)

    def _refresh(self) -> None:
        """Updates Python's copy if a load, a broadcast or an average has changed the counter."""
        if torch.compiler.is_compiling():
            return  # the copy is a constant of the graph
        counter = self._buffers[self.counter]
        if counter is None or unchanged(counter, self._seen):
            return
        self.__dict__["_seen"] = buffer_state(counter)
        if counter.item() != self._value:
            with self._lock:  # another thread may be changing rows and counter
                self._take(int(counter.item()))

    def _alone(self) -> AbstractContextManager[Any]:
        """A context in which no other thread changes the memory. torch.compile does not support locks."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def _take(self, value: int) -> None:
        """Sets Python's copy of the counter, and what depends on it."""
        self._value = value

    def _count_on(self, by: int) -> None:
        """Increases the counter without waiting for a device. The caller updates what `_take` would set."""
        counter = self._buffers[self.counter]
        assert counter is not None
        if torch.compiler.is_compiling():  # a value read here would be a constant of the graph
            counter.add_(by)
            return
        # Bypasses nn.Module's __setattr__, which takes longer than the operation.
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
        if without_content and not self.rows.is_meta:  # `to_empty`: the buffers are uninitialised
            self.reset()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own lock and its own buffers, to which the states recorded here do not apply.
        left = ("_lock", "_seen", "_filled_seen")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers.setdefault("tag_words", None)  # of a memory that was saved before there were tags
        self._lock = threading.RLock()

    # Loading a state is all or nothing: if a key is missing or does not fit, no tensor of this module is copied and no
    # counter changes. Unexpected keys are left to torch to report: only torch knows whether strict=False.

    def _valid(self, value: int) -> bool:
        """Whether the counter can have this value."""
        raise NotImplementedError

    def _of_former(self, counters: list[int]) -> int | None:
        """The counter's value for counters saved by earlier versions; None if the counters are invalid."""
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
        wrong.append(self._beyond_tags(prefix + "tag_words", state_dict))
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

    def _beyond_tags(self, key: str, state_dict: Mapping[str, Any]) -> str:
        """An error message if a state has tags that this memory lacks; two numbers of tags may need as many words."""
        words, own, room = state_dict.get(key), self._buffers["tag_words"], self.tag_count % WORD
        if own is None or not room or type(words) is not Tensor or words.is_meta or _misfit(key, words, own):
            return ""
        beyond = bool(((words[:, -1] >> room) != 0).any())
        return f"{key}: expected {self.tag_count} tags, got more" if beyond else ""

    def _with_counter(self, state_dict: Mapping[str, Any], prefix: str) -> tuple[Mapping[str, Any], str]:
        """The state with its counter as a tensor, converted from earlier versions, and an error message or ""."""
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
    """A value that differs after every change of the buffer that torch records; None if torch records none."""
    if type(buffer) is not Tensor or buffer.is_inference():
        return None
    return buffer, buffer.data_ptr(), buffer._version


def unchanged(buffer: Tensor, seen: tuple[Tensor, int, int] | None) -> bool:
    """Whether a buffer is still in the state `seen`, or has no values.

    On the CPU the answer is always False: reading the buffer is just as fast, and detects writes through `.data` too.
    Under a dispatch mode, which may forbid reading, states are compared on the CPU as well.
    """
    if type(buffer) is not Tensor or buffer.is_meta:
        return True
    if buffer.is_cpu and torch._C._len_torch_dispatch_stack() == 0:
        return False
    if seen is None or seen[0] is not buffer or buffer.is_inference():
        return False
    return seen[1:] == (buffer.data_ptr(), buffer._version)


def _misfit(key: str, value: Any, like: Tensor) -> str:
    """Why a value cannot be copied into `like`; empty if it can."""
    if not isinstance(value, Tensor):
        return f"{key}: expected a tensor, got {type(value).__name__}"
    if value.shape != like.shape:
        return f"{key}: expected shape {list(like.shape)}, got {list(value.shape)}"
    return "" if _kind(value) == _kind(like) else f"{key}: expected {_kind(like)}, got {value.dtype}"


def _unassignable(key: str, value: Any, like: Tensor) -> str:
    """Why a value cannot become the memory's buffer with ``assign=True``; empty if it can."""
    if not isinstance(value, Tensor) or value.shape != like.shape or _kind(value) != _kind(like):
        return ""  # `_misfit` reports it
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
