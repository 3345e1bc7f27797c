"""An extension of griffe: roles, formulas, tables and literal blocks of the docstrings become Markdown."""

from __future__ import annotations

import inspect
import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([^`]+)`")
FORMULA = re.compile(r":math:`([^`]+)`")
DISPLAYED = re.compile(r"^( *)\.\. math:: ?(.*(?:\n+\1 +\S.*)*)", re.MULTILINE)
TABLE = re.compile(r"^( *)(=+(?: +=+)+)\n(.*)\n\1\2\n((?:.*\n)*?)\1\2$", re.MULTILINE)


class Markdown(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            home = "fastcl.metric_learning" if obj.module.path == "fastcl.metric_learning" else "fastcl"
            obj.docstring.value = markdown(inspect.cleandoc(obj.docstring.value), home)


def markdown(text: str, home: str) -> str:
    """home: the module on whose page a name without a module is."""
    text = TABLE.sub(_table, text)
    text = DISPLAYED.sub(lambda m: f"{m[1]}\\[{' '.join(m[2].split())}\\]", text)
    text = FORMULA.sub(lambda m: f"\\({' '.join(m[1].split())}\\)", text)
    text = ROLE.sub(lambda m: _reference(m[1], home), text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _reference(name: str, home: str) -> str:
    if name.startswith("torch."):
        return f"`{name}`"
    if name == "sinkhorn":  # also the name of a module
        return "[`sinkhorn`][fastcl.functional.sinkhorn]"
    return f"[`{name}`][{name if name.startswith('fastcl.') else f'{home}.{name}'}]"


def _table(match: re.Match[str]) -> str:
    indent, rule, head, body = match.groups()
    starts = [column.start() for column in re.finditer("=+", rule)]
    rows = [head, *body.rstrip("\n").split("\n")]
    lines = []
    for row in rows:
        row = row[len(indent) :].replace("|", r"\vert ")  # of formulas: a bar would end the cell
        cells = [row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        lines.append(indent + "| " + " | ".join(cells) + " |")
    lines.insert(1, indent + "|" + "---|" * len(starts))
    return "\n".join(lines)
