"""Examples and the Python of the documentation run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # tests/integrations has those of docs/integrations


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_blocks_of_a_page_run(page: Path) -> None:
    """One after another, as a reader would paste them."""
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    for k, block in enumerate(blocks(page)):
        exec(compile(block, f"<{page.name}, block {k}>", "exec"), scope)


@pytest.mark.parametrize("name", ["supcon.py", "own_loss.py", "pmsn.py", "moco.py"])
def test_examples_run_as_scripts(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / name],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = __import__(request.param)
    yield module
    del sys.modules[request.param]


@pytest.mark.parametrize("example", ["own_loss"], indirect=True)
def test_own_loss_is_alignment_and_uniformity(example) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(31, 7, dtype=torch.float64, generator=g)
    clusters = torch.randint(0, 12, (31,), generator=g)
    unit = torch.nn.functional.normalize(z, dim=1)
    distance = torch.cdist(unit, unit) ** 2
    other = ~torch.eye(31, dtype=torch.bool)
    positive = (clusters[:, None] == clusters) & other
    rows = positive.any(1)
    alignment = ((distance * positive).sum(1) / positive.sum(1))[rows].mean()
    uniformity = (-2 * distance)[other].exp().mean().log()
    assert not rows.all()
    torch.testing.assert_close(example.align_uniform(z, clusters), alignment + 0.5 * uniformity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("example", ["supcon"], indirect=True)
def test_supcon_example_learns(example) -> None:
    assert example.main(steps=20) > 0.85


@pytest.mark.parametrize("example", ["pmsn"], indirect=True)
def test_pmsn_example_follows_its_priors(example) -> None:
    shares = example.main(steps=60)
    assert shares["uniform"].max() < 0.2
    assert shares["power law"].max() > 0.25


@pytest.mark.parametrize("example", ["moco"], indirect=True)
def test_moco_example_learns(example) -> None:
    assert example.main(steps=40) > 0.95


def test_local_links_of_the_documentation_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
