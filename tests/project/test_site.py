"""The documentation's site: every page is found, every link leads somewhere, every public name has its reference."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fastcl

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


class _Configuration(yaml.SafeLoader):
    pass


_Configuration.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def chosen() -> list[str]:
    """The pages of the navigation."""
    found: list[str] = []

    def walk(part: object) -> None:
        if isinstance(part, str):
            found.append(part)
        for below in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            walk(below)

    walk(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Configuration)["nav"])
    return found


def test_every_public_name_has_one_reference() -> None:
    found = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: fastcl\.(\S+)", page.read_text(), re.M)
    ]
    modules = {"distributed", "functional", "metric_learning"}
    names = {name.removeprefix("functional.") for name in found}
    assert len(set(found)) == len(found)
    assert names >= {*fastcl.__all__} - modules
    assert names >= {*fastcl.functional.__all__}
    assert {f"metric_learning.{name}" for name in fastcl.metric_learning.__all__} <= {*found}


def test_navigation_has_every_page_of_docs() -> None:
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= {*chosen()}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_begins_with_whom_it_is_for(page: Path) -> None:
    assert re.match(r"# .+\n\nFor those who(se)? ", page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = (sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(tmp_path / "site"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(path.relative_to(tmp_path / "site")): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "api/contrastive.html", "CONTRIBUTING.html", "examples/moco.html"} <= {*pages}
    for name, page in pages.items():
        words = re.sub(r"<(code|pre|script|math).*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r":(math|class|func):`|\.\. math::|\\[(\[]", words), f"{name} shows reStructuredText"
        assert not re.search(r'(src|href)="https?://', page), f"{name} needs another host"
    assert pages["api/contrastive.html"].count("<math") > 5
