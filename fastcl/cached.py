"""Batches whose activations do not fit in memory: embeddings first, their gradients next, encoders again by chunks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .checks import check_count, check_flag

Encode = Callable[[Any], Tensor] | tuple[Callable[[Any], Tensor], ...]


def cached_step(
    encode: Encode,
    inputs: Any,
    criterion: Callable[..., Any],
    *,
    chunk_size: int | Sequence[int],
    scaler: torch.amp.GradScaler | None = None,
    sync: bool = True,
) -> Any:
    """Forward and backward of a large batch in the memory of a small one: gradients are added to ``.grad``.

    The encoders run twice (GradCache). First all chunks without a graph; then the criterion and its backward, once, of
    all embeddings; then each chunk with its graph, whose backward receives its part of the gradient. Activations of
    one chunk are in memory at a time. Loss and gradients are those of ``criterion(encode(inputs)).backward()``::

        optimizer.zero_grad()
        loss = cached_step((image_tower, text_tower), (images, texts), lambda x, y: loss_fn(x, contrasts=y),
                           chunk_size=64)
        optimizer.step()

    Args:
        encode: a module or function, called with a chunk of the inputs: ``[n, ...]`` rows for n samples. Or a tuple of
            these, one for each of the inputs. One encoder with a tuple of inputs encodes all of them.
        inputs: a tensor; a dictionary of tensors and lists (its other values are passed on as they are); a list of
            samples; or a tuple of these. All are cut along their first dimension. May have 0 samples.
        criterion: called with the embeddings of each of the inputs. Returns a loss, or a tuple of a loss and anything
            else. Called once, so it may also update a queue, and may use ``gather``.
        chunk_size: samples of a chunk, >= 1; or a sequence, one for each of the inputs.
        scaler: a GradScaler, whose scale the gradients get.
        sync: whether DDP and FSDP synchronise gradients, once, in the last chunk. False for all batches of an
            accumulation but the last. DDP's ``no_sync()`` around the call does the same.

    Returns:
        What the criterion returned, with the loss detached.

    The state of torch's random generators, of the CPU and of the devices of inputs and parameters, is replayed, so
    dropout repeats. Autocast around the call holds in both passes. Parameters of a module wrapped in DDP that only the
    criterion uses, such as a learned temperature, are averaged with the last chunk. Batch normalisation in training
    mode normalises each chunk by its own statistics, and updates its running ones in both passes.

    Every process needs the same number of chunks with FSDP, but not with DDP. :class:`CachedStep` is the form for
    frameworks that call ``loss.backward()`` themselves.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: if gradients are disabled.

    Source: Gao et al., "Scaling deep contrastive learning batch size under memory limited setup" (2021).
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("cached_step: expected gradients to be enabled, got torch.no_grad()")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler: expected a GradScaler or None, got {type(scaler).__name__}")
    check_flag("sync", sync)
    batch = _Batch(encode, inputs, chunk_size)
    leaves = batch.embeddings()
    result = criterion(*leaves)
    loss = _loss_of(result)
    if not loss.requires_grad:
        raise ValueError("criterion: expected a loss that depends on embeddings or parameters with a gradient")
    owned = _owned_parameters(loss, batch.encoders)
    before = {parameter: parameter.grad for parameter in owned}
    for parameter in owned:
        parameter.grad = None
    with _Autocast.off(batch.devices):
        (loss if scaler is None else scaler.scale(loss)).backward()
    gradients = {parameter: parameter.grad for parameter in owned}
    for parameter, grad in before.items():
        parameter.grad = grad
    batch.replay([leaf.grad for leaf in leaves], gradients, sync)
    return _detached(result)


class CachedStep(nn.Module):
    """:func:`cached_step` for frameworks that call ``loss.backward()`` themselves: the backward runs the second pass.

    ::

        step = CachedStep((image_tower, text_tower), criterion, chunk_size=64)
        loss = step((images, texts))
        loss.backward()

    The encoders run without a graph in the forward, and by chunks in the backward. Their gradients reach the
    parameters once, as in any other backward, so scalers, accumulation, hooks and DDP around this module or around a
    module that holds it work as usual.

    Args:
        encode: a module, or a tuple of modules, one for each of the inputs. Not wrapped in DDP (wrap this module) and
            not sharded by FSDP (use :func:`cached_step`).
        criterion: a module or function, called with the embeddings of each of the inputs.
        chunk_size: as in :func:`cached_step`.

    Shapes of ``forward(inputs, *args, **kwargs)``: inputs as in :func:`cached_step`. Other arguments are passed to the
    criterion, after the embeddings.

    Returns what the criterion returns.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """

    def __init__(
        self,
        encode: nn.Module | tuple[nn.Module, ...],
        criterion: Callable[..., Any],
        *,
        chunk_size: int | Sequence[int],
    ) -> None:
        super().__init__()
        encoders = encode if isinstance(encode, tuple) else (encode,)
        for encoder in encoders:
            if not isinstance(encoder, nn.Module):
                raise TypeError(f"encode: expected a module or a tuple of modules, got {type(encoder).__name__}")
            self._check(encoder)
        if not encoders:
            raise ValueError("encode: expected a module or a tuple of modules, got an empty tuple")
        if not callable(criterion):
            raise TypeError(f"criterion: expected a module or function, got {type(criterion).__name__}")
        self.encoders = nn.ModuleList(encoders)
        self.criterion = criterion
        self.shared = not isinstance(encode, tuple)
        self.chunk_size = _chunk_size(chunk_size)

    @staticmethod
    def _check(encoder: nn.Module) -> None:
        for module in encoder.modules():
            if isinstance(module, DistributedDataParallel) or _is_sharded(module) or hasattr(module, "no_sync"):
                raise ValueError(
                    "encode: expected modules without DDP and FSDP (wrap the CachedStep in DDP, or use cached_step), "
                    f"got {type(module).__name__}"
                )

    def forward(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for encoder in self.encoders:
            self._check(encoder)
        encode: Any = self.encoders[0] if self.shared else tuple(self.encoders)
        batch = _Batch(encode, inputs, self.chunk_size)
        leaves = batch.embeddings()
        if torch.is_grad_enabled():
            sources = _sources(self.encoders, inputs)
            leaves = list(_Replay.apply(batch, sources, len(leaves), *leaves, *sources))
        return self.criterion(*leaves, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


class _Replay(torch.autograd.Function):
    """The embeddings; the backward encodes again, and returns the gradients of all that the encoders depend on."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, sources: list[Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.batch, ctx.sources = batch, sources
        ctx.set_materialize_grads(False)
        found = tuple(leaf.detach() for leaf in tensors[:count])
        ctx.mark_non_differentiable(*(out for out, leaf in zip(found, tensors, strict=False) if not leaf.requires_grad))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None] * len(ctx.sources)
        for _, embeddings, grad in ctx.batch.again(grads):
            found = torch.autograd.grad(embeddings, ctx.sources, grad, allow_unused=True)
            for k, part in enumerate(found):
                total = totals[k]
                if part is not None:
                    totals[k] = part if total is None else total.add_(part)
        return None, None, None, *[None] * len(grads), *totals


class _Job(NamedTuple):
    """A chunk to encode."""

    place: int  # of its input
    encoder: Callable[[Any], Tensor]
    chunk: Any
    rows: slice
    random: list[tuple[torch.device, Tensor]]  # states of generators before its first pass


class _Batch:
    """The chunks of all inputs."""

    def __init__(self, encode: Any, inputs: Any, chunk_size: Any) -> None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        encoders = encode if isinstance(encode, tuple) else (encode,) * len(given)
        if not given:
            raise ValueError("inputs: expected a tensor, dictionary, list, or a tuple of these, got an empty tuple")
        if len(encoders) != len(given):
            raise ValueError(f"inputs: expected a tuple of {len(encoders)}, one for each encoder, got {len(given)}")
        for encoder in encoders:
            if not callable(encoder):
                expected = "a module or function, or a tuple of these"
                raise TypeError(f"encode: expected {expected}, got {type(encoder).__name__}")
        sizes = _chunk_size(chunk_size)
        sizes = (sizes,) * len(given) if isinstance(sizes, int) else sizes
        if len(sizes) != len(given):
            raise ValueError(f"chunk_size: expected {len(given)} numbers, one for each of the inputs, got {len(sizes)}")
        self.encoders, self.inputs, self.sizes = encoders, given, sizes
        named = isinstance(inputs, tuple)
        self.lengths = [_length(one, f"inputs[{k}]" if named else "inputs") for k, one in enumerate(given)]
        self.devices = _devices(encoders, given)
        self.autocast = _Autocast.now(self.devices)
        self.jobs: list[_Job] = []

    def embeddings(self) -> list[Tensor]:
        """First pass: the embeddings of each of the inputs, as leaves."""
        leaves = []
        for place, (encoder, one, size, length) in enumerate(
            zip(self.encoders, self.inputs, self.sizes, self.lengths, strict=True)
        ):
            learned = torch.is_grad_enabled() and _is_learned(encoder, one)
            parts = []
            for start in range(0, max(length, 1), size):  # DDP needs a forward of an empty batch too
                rows = slice(start, min(start + size, length))
                job = _Job(place, encoder, _cut(one, rows, length), rows, _random_states(self.devices))
                with torch.no_grad():
                    parts.append(_encoded(job))
                if learned:
                    self.jobs.append(job)
            torch.clear_autocast_cache()  # holds weights that were cast without a graph
            leaf = parts[0] if len(parts) == 1 else torch.cat(parts)
            leaves.append(leaf.detach().requires_grad_(learned))
        return leaves

    def again(
        self, grads: Sequence[Tensor | None], before: Callable[[int], Any] | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Second pass: of each chunk its number, its embeddings with their graph and their gradient.

        before: makes a context in which chunk k is encoded and differentiated.
        """
        for k, job in enumerate(self.jobs):
            with ExitStack() as around:
                if before is not None:
                    around.enter_context(before(k))
                with torch.enable_grad(), _replayed(job.random), self.autocast.on():
                    embeddings = _encoded(job)
                torch.clear_autocast_cache()
                grad = grads[job.place]
                part = torch.zeros_like(embeddings) if grad is None else grad[job.rows].to(embeddings.dtype)
                if embeddings.requires_grad:
                    with _Autocast.off(self.devices):
                        yield k, embeddings, part

    def replay(self, grads: Sequence[Tensor | None], owned: Mapping[Tensor, Tensor | None], sync: bool) -> None:
        """Second pass, which accumulates gradients of parameters.

        owned: gradients of parameters of DDP modules that the criterion has given, added with their last chunk.
        """
        last: dict[nn.Module, int] = {}
        for k, job in enumerate(self.jobs):
            last |= dict.fromkeys((*_wrappers(job.encoder), *_sharded(job.encoder)), k)

        @contextmanager
        def around(k: int) -> Iterator[None]:
            with ExitStack() as stack:
                for wrapper in _wrappers(self.jobs[k].encoder):
                    if last[wrapper] != k or not sync:
                        stack.enter_context(wrapper.no_sync())
                    if last[wrapper] == k:
                        stack.enter_context(_attached(wrapper, owned))
                for module in _sharded(self.jobs[k].encoder):
                    module.set_requires_gradient_sync(sync and last[module] == k, recurse=False)
                    module.set_is_last_backward(last[module] == k)
                yield

        try:
            for _, embeddings, grad in self.again(grads, around):
                torch.autograd.backward(embeddings, grad)
        finally:
            for encoder in self.encoders:
                for module in _sharded(encoder):
                    module.set_requires_gradient_sync(True, recurse=False)
                    module.set_is_last_backward(True)


def _encoded(job: _Job) -> Tensor:
    embeddings = job.encoder(job.chunk)
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"encode: expected to return a tensor, got {type(embeddings).__name__}")
    n = job.rows.stop - job.rows.start
    if embeddings.dim() == 0 or len(embeddings) != n:
        raise ValueError(f"encode: expected to return {n} rows for {n} samples, got shape {list(embeddings.shape)}")
    return embeddings


def _chunk_size(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(check_count("chunk_size", size, least=1) for size in value)
    return check_count("chunk_size", value, least=1)


# Inputs.


def _length(one: Any, name: str) -> int:
    """The number of samples."""
    if isinstance(one, Mapping):
        lengths = {key: len(value) for key, value in one.items() if _is_cut(value)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"{name}: expected tensors and lists of one length, got {lengths}")
        return next(iter(lengths.values()))
    if not _is_cut(one):
        got = f"shape {list(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
        raise TypeError(f"{name}: expected a tensor [N, ...], dictionary or list, got {got}")
    return len(one)


def _is_cut(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)


def _cut(one: Any, rows: slice, length: int) -> Any:
    if rows == slice(0, length):
        return one
    if not isinstance(one, Mapping):
        return one[rows]
    return {key: value[rows] if _is_cut(value) else value for key, value in one.items()}


def _tensors(given: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(given) if isinstance(given, Mapping) else given) if _is_tensor(leaf)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_learned(encoder: Any, one: Any) -> bool:
    """Whether embeddings have a gradient. Of a function only its results tell; it is taken to have one."""
    given = any(tensor.requires_grad for tensor in _tensors(one))
    return given or not isinstance(encoder, nn.Module) or any(p.requires_grad for p in encoder.parameters())


def _sources(encoders: nn.ModuleList, inputs: Any) -> list[Tensor]:
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    found = [*encoders.parameters(), *(tensor for one in given for tensor in _tensors(one))]
    return list(dict.fromkeys(tensor for tensor in found if tensor.requires_grad))


# Random generators and autocast.


def _devices(encoders: Sequence[Any], inputs: Sequence[Any]) -> list[torch.device]:
    """The devices other than the CPU."""
    tensors = [tensor for one in inputs for tensor in _tensors(one)]
    tensors += [p for encoder in encoders if isinstance(encoder, nn.Module) for p in encoder.parameters()]
    found = dict.fromkeys(tensor.device for tensor in tensors)
    return [device for device in found if device.type not in ("cpu", "meta")]


def _random_states(devices: Sequence[torch.device]) -> list[tuple[torch.device, Tensor]]:
    found = [(torch.device("cpu"), torch.get_rng_state())]
    for device in devices:
        module = torch.get_device_module(device)
        state = module.get_rng_state(device) if device.index is not None else module.get_rng_state()
        found.append((device, state))
    return found


def _set_random_states(states: Sequence[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            module = torch.get_device_module(device)
            module.set_rng_state(state, device) if device.index is not None else module.set_rng_state(state)


@contextmanager
def _replayed(states: Sequence[tuple[torch.device, Tensor]]) -> Iterator[None]:
    """Inside, the generators have these states. Afterwards they go on as before."""
    now = _random_states([device for device, _ in states if device.type != "cpu"])
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(now)


class _Autocast(NamedTuple):
    """Autocast by type of device: whether it is enabled, and its dtype."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, devices: Sequence[torch.device]) -> _Autocast:
        kinds = dict.fromkeys(["cpu", *(device.type for device in devices)])
        return cls(tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))

    @contextmanager
    def on(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield

    @classmethod
    @contextmanager
    def off(cls, devices: Sequence[torch.device]) -> Iterator[None]:
        """Backwards do not run under autocast."""
        found = cls.now(devices)
        with cls(tuple((kind, False, dtype) for kind, _, dtype in found.states)).on():
            yield


# Processes.


def _wrappers(encoder: Any) -> list[Any]:
    """The wrappers that synchronise gradients in each backward outside of `no_sync`."""
    if not isinstance(encoder, nn.Module):
        return []
    return [module for module in encoder.modules() if hasattr(module, "no_sync")]


def _sharded(encoder: Any) -> list[Any]:
    """The modules of `fully_shard`."""
    if not isinstance(encoder, nn.Module):
        return []
    return [module for module in encoder.modules() if _is_sharded(module)]


def _is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied. Importing its package here would double the time to import fastcl."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _owned_parameters(loss: Tensor, encoders: Sequence[Any]) -> list[Tensor]:
    """The parameters of modules wrapped in DDP that the loss depends on other than by the embeddings.

    DDP ignores gradients that come outside of the backward of its own forward.
    """
    wrapped = {
        parameter for encoder in encoders for wrapper in _wrappers(encoder) for parameter in wrapper.parameters()
    }
    if not wrapped:
        return []
    seen: set[Node] = set()
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    found = []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable in wrapped:
            found.append(variable)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


@contextmanager
def _attached(wrapper: Any, owned: Mapping[Tensor, Tensor | None]) -> Iterator[None]:
    """Inside, the backward of the wrapped module's output also adds its parameters' gradients in `owned`.

    The output depends on them then, so DDP counts them as used, and reduces them with the others.
    """
    mine = set(wrapper.parameters())
    gradients = {parameter: grad for parameter, grad in owned.items() if parameter in mine and grad is not None}
    if not gradients:
        yield
        return

    def attach(module: nn.Module, arguments: Any, output: Any) -> Any:
        leaves, form = tree_flatten(output)
        floating = [k for k, leaf in enumerate(leaves) if _is_tensor(leaf) and leaf.is_floating_point()]
        k = next((k for k in floating if leaves[k].requires_grad), floating[0])
        leaves[k] = _Attach.apply(list(gradients.values()), leaves[k], *gradients)
        return tree_unflatten(leaves, form)

    hook = wrapper.module.register_forward_hook(attach)
    try:
        yield
    finally:
        hook.remove()


class _Attach(torch.autograd.Function):
    """A tensor as it is. The backward gives parameters their gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad, *ctx.gradients


# Results of a criterion.


def _loss_of(result: Any) -> Tensor:
    loss = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(loss, Tensor):
        raise TypeError(f"criterion: expected to return a loss or a tuple with it, got {type(result).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"criterion: expected to return a scalar, got shape {list(loss.shape)}")
    return loss


def _detached(result: Any) -> Any:
    return (result[0].detach(), *result[1:]) if isinstance(result, tuple) else result.detach()
