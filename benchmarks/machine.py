"""The machine and the commit of a run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def instruction_set(device: torch.device) -> str:
    if device.type == "cuda":
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    capability: str = torch.backends.cpu.get_cpu_capability()
    return capability


def slug(name: str, threads: int, device: torch.device) -> str:
    """A folder's name: "Intel(R) Xeon(R) Processor" on two threads is intel-xeon-2-threads."""
    words = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bProcessor\b", " ", name)
    short = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return short if device.type == "cuda" else f"{short}-{threads}-threads"


class Others:
    """The share of the machine that other programs use from the creation of this object to a call of `share`."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Processor seconds: in all, busy, and used by this process."""
        try:
            user, nice, system, idle, wait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        except (OSError, ValueError):
            return None
        tick = os.sysconf("SC_CLK_TCK")
        own = os.times()
        busy = user + nice + system + sum(rest)
        return (busy + idle + wait) / tick, busy / tick, sum(own[:4])  # includes child processes that have ended

    def share(self) -> float | None:
        """None if the system does not provide the numbers."""
        now = self._read()
        if self._start is None or now is None:
            return None
        total, busy, own = (after - before for before, after in zip(self._start, now, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0) if total > 0 else 0.0


def commit() -> str:
    """The measured commit, with "+" if tracked files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastcl", "benchmarks/*.py", "csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
