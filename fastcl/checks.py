"""Checks of arguments, with errors that name the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
LARGEST_COUNT = 2**31 - 1  # of iterations, classes, samples: larger counts are mistakes that run or allocate endlessly
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def values_visible(tensor: Tensor) -> bool:
    """Whether values can be read without a wait: on the CPU, and under no tracer, mode or transform."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, Parameter)
        and not torch.compiler.is_compiling()  # first: the calls below cannot be traced
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def shown(value: Any) -> str:
    """Text of any value for a message: dtype and shape of a tensor (not all can be printed), at most 200 characters."""
    if isinstance(value, Tensor):
        shape = "" if value.is_nested else f" of shape {list(value.shape)}"
        return f"a {value.dtype} tensor{shape}"
    try:
        text = repr(value)
    except Exception:  # an integer beyond Python's limit of digits, or a user's class
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


# Tensors.


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")


def check_floating(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in ROW_DTYPES:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {value.dtype}")


def check_integers(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: expected integers, got {value.dtype}")


def check_rows(name: str, value: Any, *, dims: tuple[int, ...] = (2,), like: Tensor | None = None) -> None:
    """Expects floating rows with `dims` dimensions ([N, D] by default), with D and device of `like`."""
    check_floating(name, value)
    if value.dim() not in dims:
        shapes = {1: "[D]", 2: "[N, D]", 3: "[N, V, D]"}
        expected = " or ".join(shapes[d] for d in dims)
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one dimension per row, got shape {list(value.shape)}")
    if like is not None:
        if value.shape[-1] != like.shape[-1]:
            raise ValueError(f"{name}: expected rows of dimension {like.shape[-1]}, got shape {list(value.shape)}")
        check_device(name, value, like.device)


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")


def check_ids(name: str, value: Any, length: int, device: torch.device) -> None:
    """Expects a tensor [length] of integers."""
    check_integers(name, value)
    if tuple(value.shape) != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {list(value.shape)}")
    check_device(name, value, device)
    if value.dtype == torch.uint64 and values_visible(value) and bool((value.view(torch.int64) < 0).any()):
        raise ValueError(f"{name}: expected ids below 2**63, got larger ones in a uint64 tensor")


def check_indices(name: str, value: Any, count: int, device: torch.device) -> None:
    """Expects integers of any shape; from 0 to count - 1 if `values_visible`."""
    check_integers(name, value)
    check_device(name, value, device)
    if values_visible(value) and value.numel():
        least, most = extremes(value)
        if least < 0 or most >= count:
            raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, got {least if least < 0 else most}")


def extremes(integers: Tensor) -> tuple[int, int]:
    """The minimum and maximum of a non-empty tensor; torch has neither for uint16, uint32 and uint64."""
    integers = integers.to(torch.int64)
    return int(integers.min()), int(integers.max())


def check_vector(name: str, value: Any, length: int, device: torch.device) -> None:
    """Expects a floating tensor [length]."""
    check_floating(name, value)
    if tuple(value.shape) != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {list(value.shape)}")
    check_device(name, value, device)


def check_bias(value: Any, length: int, device: torch.device) -> None:
    """Expects the contrasts' bias: a floating tensor [length]; finite numbers or -inf if `values_visible`."""
    check_vector("contrast_bias", value, length, device)
    if length and values_visible(value):
        most = float(value.detach().amax())  # NaN if any value is
        if not most <= LARGEST:
            raise ValueError(
                f"contrast_bias: expected numbers in the range of float32, or -inf to leave a contrast out, got {most}"
            )


def check_assignments(
    name: str, value: Any, rows: tuple[int, ...], device: torch.device, like: Tensor | None = None
) -> None:
    """Expects a floating tensor [*rows, C], with C of `like`; finite numbers >= 0 if `values_visible`."""
    check_floating(name, value)
    shape = tuple(value.shape)
    if shape[:-1] != rows or len(shape) == 0 or shape[-1] == 0 or (like is not None and shape[-1] != like.shape[-1]):
        expected = ", ".join(map(str, (*rows, "C" if like is None else like.shape[-1])))
        raise ValueError(f"{name}: expected shape [{expected}], got {list(shape)}")
    check_device(name, value, device)
    if values_visible(value):
        least, most = torch.stack(value.detach().aminmax()).tolist() if value.numel() else (0, 0)  # NaN if a number is
        if not 0 <= least <= most < math.inf:
            bad = value.detach()[~((value >= 0) & value.isfinite())]
            raise ValueError(f"{name}: expected finite numbers of at least 0, got {bad[0].item()}")


def check_scores(name: str, value: Any) -> None:
    """Expects a floating tensor [N, K] or [B, N, K]."""
    check_floating(name, value)
    if value.dim() not in (2, 3):
        raise ValueError(f"{name}: expected shape [N, K] or [B, N, K], got {list(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {list(value.shape)}")


def check_masses(name: str, value: Any, size: int, batch: int | None, device: torch.device) -> None:
    """Expects a floating tensor [size], or [batch, size] with a batch. `check_mass_values` checks the values."""
    check_floating(name, value)
    shapes = [(size,)] + ([] if batch is None else [(batch, size)])
    if tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    check_device(name, value, device)


def check_mass_values(name: str, value: Tensor, alone: bool) -> None:
    """Expects finite masses >= 0 if `values_visible`, with a positive sum if `alone` (no other process has masses)."""
    if not values_visible(value):
        return
    if not value.dtype.is_floating_point:  # torch cannot compare all integer dtypes
        value = value.double()
    if not bool((value >= 0).all()) or not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected non-negative finite numbers, got {few(value)}")
    if alone and not bool((value.sum(-1) > 0).all()):
        raise ValueError(f"{name}: expected a positive sum, got {few(value)}")


def few(value: Tensor) -> str:
    """The first numbers of a tensor, for a message."""
    flat = value.detach().flatten()
    first = ", ".join(f"{number:g}" for number in flat[:6].tolist())
    return f"[{first}{', ...' if flat.numel() > 6 else ''}]"


# Options.


def check_option(name: str, value: Any, options: tuple[Any, ...]) -> None:
    if type(value) is str and value in options:
        return
    if not any(value is option or (isinstance(value, str) and value == option) for option in options):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_count(name: str, value: Any, *, least: int = 1, most: int = LARGEST_COUNT) -> int:
    """A Python or NumPy integer from `least` to `most`, as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: expected an integer, got {shown(value)}")
    count = value if isinstance(value, int) else int(value)
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {shown(value)}")
    if count > most:
        raise ValueError(f"{name}: expected at most {most}, got {shown(value)}")
    return count


def finite_number(name: str, value: Any) -> float:
    """A real number in float32's range, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not abs(number) <= LARGEST:
        raise ValueError(f"{name}: expected a finite number in the range of float32, got {shown(value)}")
    return number


def positive_number(name: str, value: Any) -> Any:
    """A positive number whose reciprocal fits float32: a float, or a tensor of one element, checked if visible."""
    if not isinstance(value, Tensor):
        number = finite_number(name, value)
    else:
        check_tensor(name, value)
        if value.numel() != 1 or value.dtype not in ROW_DTYPES:
            raise ValueError(
                f"{name}: expected a positive number or a floating tensor of one element, "
                f"got a {value.dtype} tensor of shape {list(value.shape)}"
            )
        if not values_visible(value):
            return value
        number = float(value.item())
    if not SMALLEST <= number <= LARGEST:
        raise ValueError(f"{name}: expected a positive number in the range of float32, got {number}")
    return value if isinstance(value, Tensor) else number


def finite_scalar(name: str, value: Any) -> Any:
    """A finite number in float32's range: a float, or a floating tensor of one element, checked if visible."""
    if not isinstance(value, Tensor):
        return finite_number(name, value)
    check_tensor(name, value)
    if value.numel() != 1 or value.dtype not in ROW_DTYPES:
        raise ValueError(
            f"{name}: expected a finite number or a floating tensor of one element, "
            f"got a {value.dtype} tensor of shape {list(value.shape)}"
        )
    if values_visible(value) and not abs(number := float(value.detach())) <= LARGEST:
        raise ValueError(f"{name}: expected a finite number in the range of float32, got {number}")
    return value


def plain_number(name: str, value: Any) -> float:
    """`positive_number`, but tensors are not accepted."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number, got a tensor")
    return float(positive_number(name, value))


def scalar_tensor(name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor of one element on the CPU or on `device`, as a tensor [] on `device`."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    if value.device.type != "cpu":
        check_device(name, value, device)
    return value.to(device, dtype).reshape(())
