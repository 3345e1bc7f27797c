"""Chooses tiles of the Triton kernels by time if ``FASTCL_TRITON_AUTOTUNE`` is set; otherwise the table's are used.

With ``1`` the result is kept for the process. With the name of a .json file it is read from and written to that file. A
kernel is timed at its first call of at least `FEWEST` pairs, per device, dtype and dimension. Smaller calls use the
result if there is one, else the table's tile.

Tiles determine the order of additions: the same tiles give the same bits, other tiles round differently.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from .triton_tiles import Tile, neighbours

VARIABLE = "FASTCL_TRITON_AUTOTUNE"
FEWEST = 1 << 22
REPETITIONS = 5

Trial = Callable[[Tile], None]  # launches with this tile; the results are the same up to rounding

_found: dict[str, dict[str, Tile]] = {}  # by the variable's value, then by `key`
_lock = threading.Lock()


def mode() -> str:
    """The variable's value; empty if tuning is off."""
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return ""
    if value != "1" and not value.endswith(".json"):
        raise ValueError(f"{VARIABLE}: expected 0, 1 or the name of a file that ends in .json, got {value!r}")
    return value


def choose(key: str, table: Tile, pairs: int, trial: Trial | None = None) -> Tile:
    """The fastest known tile for a kernel, else `table`. Times tiles only with a trial and at least `FEWEST` pairs."""
    asked = mode()
    if not asked:
        return table
    with _lock:
        if asked not in _found:
            _found[asked] = _read(asked)
        tiles = _found[asked]
        if key not in tiles and trial is not None and pairs >= FEWEST and not _capturing():
            tiles[key] = _fastest(table, trial)
            _write(asked, tiles)
        return tiles.get(key, table)


def seconds(launch: Callable[[], None]) -> float:
    """The median time of a launch on the current device. Waits for the device."""
    launch()
    times: list[float] = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[REPETITIONS // 2]


def _fastest(table: Tile, trial: Trial) -> Tile:
    best, least = table, seconds(lambda: trial(table))
    for tile in neighbours(table):
        try:
            time = seconds(lambda tile=tile: trial(tile))  # type: ignore[misc]
        except Exception as error:  # Triton's errors, such as too much shared memory, only rule out this tile
            if type(error).__module__.partition(".")[0] != "triton":
                raise
            continue
        if time < least:
            best, least = tile, time
    return best


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read(name: str) -> dict[str, Tile]:
    if name == "1" or not Path(name).exists():
        return {}
    try:
        return {key: Tile(*map(int, numbers)) for key, numbers in json.loads(Path(name).read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{VARIABLE}: expected tiles that fastcl has written, got {name!r}: {error}") from error


def _write(name: str, tiles: dict[str, Tile]) -> None:
    if name != "1":
        part = Path(f"{name}.{os.getpid()}")
        part.write_text(json.dumps(tiles, indent=1) + "\n")
        part.replace(name)
