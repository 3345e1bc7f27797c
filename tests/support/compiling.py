"""The environment of the processes that compile Triton kernels ahead of time."""

import os
from pathlib import Path


def environment(root: Path, cache: Path) -> dict[str, str]:
    """FASTCL_COMPILE_WITH: a folder with another Triton than the installed one."""
    other = os.environ.get("FASTCL_COMPILE_WITH")
    path = os.pathsep.join([*([other] if other else []), str(root)])
    return os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
