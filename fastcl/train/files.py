"""Files of a run: written whole or not at all, verified when they are read, and in the hands of one run at a time."""

import contextlib
import errno
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastcl.train import OptionError, WriteError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK, PART = ".lock", ".part"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_SEAL = b"sha256:"


def write(path: Path, content: str | bytes | memoryview) -> None:
    """Replace the file, all or nothing: an interruption or a full disk leaves the old one.

    When this returns, the new one is on the disk: a loss of power does not take it back. Links are not followed.
    """
    part = path.with_name(path.name + PART)
    try:
        part.unlink(missing_ok=True)  # left by a killed run, or a link: then what it points to stays as it is
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _unwritable(path, error) from error
    _synchronise(path.parent)


def append(path: Path, line: str) -> None:
    """Add a line to a file, on the disk when this returns. Links are not followed."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINK, 0o666)
        with open(descriptor, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write(path, drawn.getbuffer())


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, with a hash of the whole file as the archive's comment, which `torch.load` skips."""
    archive = io.BytesIO()
    torch.save(state, archive)
    length = len(_SEAL) + 2 * hashlib.sha256().digest_size
    with archive.getbuffer() as data:
        # An archive ends with the length of its comment, in two bytes; torch writes none.
        data[-2:] = length.to_bytes(2, "little")
        digest = hashlib.sha256(data).hexdigest()
    archive.seek(0, io.SEEK_END)
    archive.write(_SEAL + digest.encode())
    write(path, archive.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote; ValueError where a byte of it is another."""
    data = path.read_bytes()
    length = data.rfind(_SEAL)
    if length < 0:
        raise ValueError(
            "no hash at its end: cut off, not written by this trainer, or written before checkpoints had a hash"
        )
    digest = data[length + len(_SEAL) :]
    if digest.decode("latin-1") != hashlib.sha256(memoryview(data)[:length]).hexdigest():
        raise ValueError("its bytes do not have the hash at its end")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


@contextlib.contextmanager
def claimed(folder: Path, option: str = "--out") -> Iterator[None]:
    """The folder in the hands of this process alone; it is made where there is none.

    The operating system holds the lock, and lets go of it however the process ends. A folder that was made here, and in
    which nothing was written, is removed again.
    """
    made = _make(folder, option)
    path = folder / LOCK
    descriptor = _lock(path, folder, option)
    try:
        yield
    finally:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # first: once it is let go, it may be another's
                path.unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True) if sys.platform == "win32" else None
            for empty in reversed(made):
                empty.rmdir()


def leftovers_only(folder: Path) -> bool:
    """Whether nothing is in the folder but what a run that was killed at once leaves."""
    return all(entry.name == LOCK or entry.name.endswith(PART) for entry in folder.iterdir())


def _make(folder: Path, option: str) -> list[Path]:
    """Make the folder and those above it; returns those that are new, from the top."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{option} {folder} cannot be made: {error.strerror}") from error
    return missing


def _lock(path: Path, folder: Path, option: str) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        except OSError as error:
            raise OptionError(f"{option} {folder} cannot be written to: {error.strerror}") from error
        try:
            if sys.platform == "win32":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return descriptor
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise OptionError(f"{option} {folder} is in use by another process that is still running") from error
        except OSError as error:  # a file system without locks
            print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
            return descriptor
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the run that held it has ended and removed it between our opening and our locking


def _synchronise(folder: Path) -> None:
    """The names in the folder reach the disk, where the system can do that: Windows and some networks cannot."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise WriteError(f"{folder} cannot be synchronised to the disk: {error.strerror}") from error


def _unwritable(path: Path, error: OSError) -> WriteError:
    return WriteError(f"{path} cannot be written: {error.strerror}; what was there before is kept")
