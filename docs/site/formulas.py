"""A hook of mkdocs: formulas become MathML, which browsers draw without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    content = INLINE.sub(lambda match: f'<span class="formula">{_formula(match[1], "inline")}</span>', content)
    return DISPLAYED.sub(lambda match: f'<div class="formula">{_formula(match[1], "block")}</div>', content)


def _formula(latex: str, display: str) -> str:
    return str(convert(html.unescape(latex).strip(), display=display))
