"""Where and with what a run was made."""

from __future__ import annotations

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


def commit() -> str:
    """The commit that was measured, "+" after it where tracked files differ; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastcl", "benchmarks/*.py", "csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
