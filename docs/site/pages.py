"""A hook of mkdocs: every page of the project is on the site, under its path, and links lead to it there.

The pages in ``docs/`` link to READMEs, results and examples outside of it, as they would on a code host. These become
pages too. A link to any other file, such as a module, has no page to lead to and becomes plain text.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "examples", "fastcl", "tests")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "fastcl" / "__init__.py").read_text(encoding="utf-8"))
    assert version is not None
    config.copyright = f"fastcl {version[1]}, Apache-2.0"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = [path for path in ROOT.glob("*.md") if path.name != "README.md"]
    for folder in FOLDERS:
        pages += (ROOT / folder).rglob("*.md")
    for path in [*pages, *(ROOT / "benchmarks" / "results").rglob("*.png")]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in (ROOT / "examples").glob("*.py"):
        files.append(File.generated(config, f"examples/{path.stem}.md", content=_example(path)))
    return files


def _example(path: Path) -> str:
    code = path.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(code)) or ""
    return f"# `{path.name}`\n\n{about}\n\n    python examples/{path.name}\n\n```python\n{code}```\n"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    own = page.file.src_uri
    in_docs = page.file.generated_by is None

    def moved(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        place = posixpath.join("docs" if in_docs else "", posixpath.dirname(own), target)
        found = _on_site(posixpath.normpath(place), files)
        if found is None:
            return match[0] if picture else text
        return f"{picture}[{text}]({posixpath.relpath(found, posixpath.dirname(own) or '.')}{anchor or ''})"

    return LINK.sub(moved, markdown)


def _on_site(path: str, files: Files) -> str | None:
    """The site's path of a path of the project, or None."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    page = re.sub(r"^(examples/\w+)\.py$", r"\1.md", path)
    for candidate in (page, f"{path}/README.md"):
        if files.get_file_from_path(candidate) is not None:
            return candidate
    return None
