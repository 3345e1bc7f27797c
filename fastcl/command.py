"""What the commands share: their parser, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

PIPE_CLOSED = 141  # the exit code of a program that SIGPIPE ended, by the shell's custom
INTERRUPTED = 130  # and of one that SIGINT ended


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and whose help keeps the line breaks of description and examples."""

    def __init__(self, prog: str, description: str, examples: str = "") -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [options]",
            description=description.replace("``", "").strip(),
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage that argparse puts before it


def run(prog: str, main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with its exit code: without a traceback where the surroundings are at fault.

    These are a reader that closes the pipe, a standard output that cannot be written, and Ctrl-C while `main` runs.
    (Before, while modules are imported, Python answers Ctrl-C with a traceback; nothing is written then.) A second
    Ctrl-C ends the process at once. Every file that the commands write is whole at every moment.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _first_interrupt)
    try:
        code = main()
        _flush()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        code = PIPE_CLOSED
    except OSError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        code = 2
    except SystemExit as ending:  # argparse: --help, errors
        code = _code(ending)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit; what could not be printed is not tried again, which Python would report with a traceback."""
    try:
        _flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
            code = code or 2
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _flush() -> None:
    if sys.stdout is not None:  # as it is where a shell closed it: >&-
        sys.stdout.flush()


def _code(ending: SystemExit) -> int:
    if isinstance(ending.code, str):  # sys.exit("what is wrong")
        print(ending.code, file=sys.stderr)
        return 1
    return ending.code or 0


def _first_interrupt(number: int, frame: Any) -> NoReturn:
    signal.signal(number, _second_interrupt)
    raise KeyboardInterrupt


def _second_interrupt(number: int, frame: Any) -> NoReturn:
    with contextlib.suppress(OSError, AttributeError, ValueError):  # as in 2>&-, where 2 may be another file by now
        os.write(sys.stderr.fileno(), b"\ninterrupted again: stopped at once; what was written before is whole\n")
    os._exit(INTERRUPTED)
