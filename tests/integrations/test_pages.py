"""The pages of docs/integrations and their examples: one of each for a package, and the Python of the pages runs."""

import re

import pytest
import torch

from tests.support.integrations import ROOT, package

EXAMPLES = {path.stem.removeprefix("with_"): path for path in (ROOT / "examples").glob("with_*.py")}
PAGES = {path.stem.replace("-", "_"): path for path in (ROOT / "docs" / "integrations").glob("*.md")}
MODULES = {"metric_learning": "pytorch_metric_learning", "solo_learn": "torch"}


def test_a_page_and_a_short_example_for_each_package() -> None:
    assert PAGES.keys() == EXAMPLES.keys()
    assert len(PAGES) == 7
    for name, path in EXAMPLES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name
        assert f"examples/{path.name}" in PAGES[name].read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch) -> None:
    """Its blocks one after another, as a reader would paste them."""
    module = package(MODULES.get(name, name))
    if name == "accelerate":  # its state, which another test may have made, belongs to the process
        module.state.AcceleratorState._reset_state(True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[name].read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), f"<{name}>", "exec"), {"__name__": "page"})


def test_local_links_lead_somewhere() -> None:
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
