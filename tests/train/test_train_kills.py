"""A killed run goes on to the numbers of one that was never stopped. By hand: ``python -m tests.train.kills``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks")
def test_killed_runs_go_on_to_the_same_numbers() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kills", "--kills", "5"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 kills ended with the numbers of the uninterrupted run" in done.stdout
