"""A guard behind every workspace of the native engines: a call that writes past its workspace fails its test."""

import ctypes
from typing import Any

from fastcl.ops.backends import native

SIZE = 1 << 12
PATTERN = b"\xa5" * SIZE


class Guarded:
    """A call that needs `SIZE` bytes more, which it must leave as they are."""

    def __init__(self, call: Any) -> None:
        self.call, self.size = call, call.workspace
        self.workspace = self.size + SIZE

    def run(self, address: int) -> None:
        ctypes.memmove(address + self.size, PATTERN, SIZE)
        self.call.run(address)
        if ctypes.string_at(address + self.size, SIZE) != PATTERN:
            raise AssertionError(f"{type(self.call).__name__}: wrote past its workspace of {self.size} bytes")


def guard() -> None:
    run = native.run
    native.run = lambda call: run(Guarded(call))
