"""Formulas become MathML while the site is built, so that no page loads a script for them."""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def on_page_content(content: str, **_: object) -> str:
    """Called by mkdocs for every page."""
    content = _INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    return _DISPLAY.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)
