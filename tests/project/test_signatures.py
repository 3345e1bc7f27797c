"""Calls in the documentation match the real signatures: names, order and defaults."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastcl

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"]
PUBLIC = {name: value for name in fastcl.__all__ if callable(value := getattr(fastcl, name))}
CLASSES = {name: value for name, value in PUBLIC.items() if "forward" in vars(value)}


def parameters(function: Any) -> dict[str, tuple[Any, str]]:
    """For each parameter whether it is keyword-only, and its default as Python writes it."""
    found = [part for part in inspect.signature(function).parameters.values() if part.name != "self"]
    return {
        part.name: (part.kind is part.KEYWORD_ONLY, "" if part.default is part.empty else repr(part.default))
        for part in found
    }


def written(signature: str) -> dict[str, tuple[Any, str]]:
    """The same for the text between parentheses."""
    scope: dict[str, Any] = {}
    exec(f"def function({signature}): ...", scope)
    return parameters(scope["function"])


def shown_signatures() -> Iterator[tuple[str, str, str]]:
    """Page, name and text of each signature in an indented block: ``Name(...)``, and ``criterion(...)`` of these."""
    for page in PAGES:
        for block in re.findall(r"(?:^    .*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
            found = re.findall(r"^    (?:loss = )?(\w+)\(([^()]*)\)", block, re.MULTILINE)
            named = [(name, signature) for name, signature in found if name in PUBLIC]
            yield from ((page.name, *one) for one in named)
            for signature in (signature for name, signature in found if name == "criterion"):
                yield from ((page.name, f"{name}.forward", signature) for name, _ in named)


def docstring_signatures() -> Iterator[tuple[str, str, str]]:
    for name, kind in CLASSES.items():
        found = re.search(r"``forward\((.*?)\)``", kind.__doc__ or "", re.DOTALL)
        if found:
            yield "docstring", f"{name}.forward", found[1]


SHOWN = [*shown_signatures(), *docstring_signatures()]


def test_signatures_are_found() -> None:
    names = {name for _, name, _ in SHOWN}
    expected = {"ClusterInfoNCE", "DebiasedLoss", "HardNegativeLoss", "alignment", "uniformity"}
    assert names >= expected | {"ClusterInfoNCE.forward", "DebiasedLoss.forward", "HardNegativeLoss.forward"}


@pytest.mark.parametrize(("page", "name", "signature"), SHOWN, ids=[f"{page}-{name}" for page, name, _ in SHOWN])
def test_signature(page, name, signature) -> None:
    kind, _, method = name.partition(".")
    assert written(signature) == parameters(getattr(PUBLIC[kind], method) if method else PUBLIC[kind])


def calls(page: Path) -> Iterator[ast.Call]:
    """The calls in the page's inline code. In a table of another library's calls and ours, only ours."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    if page.name == "migration.md":
        text = "\n".join(line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ") and " | " in line)
    for code in re.findall(r"`([^`\n]+)`", text):
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def bound(call: ast.Call) -> bool:
    """Binds a call's arguments to the signature of its function, if that is public."""
    names = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    made = call.func
    if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id in CLASSES:
        inspect.signature(CLASSES[made.func.id].forward).bind(None, *call.args, **names)
    elif isinstance(made, ast.Name) and made.id in PUBLIC:
        inspect.signature(PUBLIC[made.id]).bind_partial(*call.args, **names)
    else:
        return False
    return True


def misfit(call: ast.Call) -> str:
    """Why a call does not fit its signature; empty if it does."""
    try:
        bound(call)
    except TypeError as error:
        return f"{ast.unparse(call)}: {error}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_calls(page) -> None:
    assert [found for call in calls(page) if (found := misfit(call))] == []


def test_inline_calls_are_found() -> None:
    assert sum(bound(call) for page in PAGES for call in calls(page)) > 60
