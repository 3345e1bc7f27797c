"""What the kernels may not use, because the oldest supported Triton (3.2) does not compile it."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "fastcl").rglob("*kernels.py"))


def chained(source: str) -> list[str]:
    """Operators between more than two operands that are not grouped by parentheses."""
    found = []
    for node in ast.walk(ast.parse(source)):
        of_booleans = isinstance(node, ast.BoolOp) and len(node.values) > 2
        if of_booleans or (isinstance(node, ast.Compare) and len(node.ops) > 1):
            found.append(ast.unparse(node))
    return found


def test_chains_are_found() -> None:
    assert chained("a and b and not c") == ["a and b and (not c)"]
    assert chained("a < b < c") == ["a < b < c"]
    assert chained("(a and b) and c or d") == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: "/".join(path.parts[-3:]))
def test_kernels_have_no_chains(path) -> None:
    assert chained(path.read_text()) == []


def test_all_kernels_are_looked_at() -> None:
    assert len(KERNELS) >= 8
