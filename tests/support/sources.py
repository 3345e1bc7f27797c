"""The files of the sources, in a checkout and in an unpacked source distribution."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sources(*endings: str) -> list[Path]:
    """The files that git knows or would add, relative to the root; in a source distribution, those that it lists."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    else:
        listed = (ROOT / "fastcl.egg-info" / "SOURCES.txt").read_text(encoding="utf-8")
    names = [name for name in listed.splitlines() if not name.startswith("fastcl.egg-info/")]
    return [Path(name) for name in names if name.endswith(endings or ("",)) and (ROOT / name).is_file()]
