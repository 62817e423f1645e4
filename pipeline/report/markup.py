"""Decides how text becomes markup: whatever is not `Html` already is escaped, so nothing from a corpus can be any.

It knows neither pages nor what is written on them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# What no page may hold, or nobody would see. Surrogates cannot be written as UTF-8.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
VOID = ("meta", "img", "br")


class Html(str):
    """Markup, safe as it is."""

    __slots__ = ()


Child = str | None | Iterable["str | None"]


def el(tag: str, *children: Child, **attributes: str | float | None) -> Html:
    """An element with its children and attributes; those that are None are left out.

    >>> el("p", "1 < 2", class_="sum")
    '<p class="sum">1 &lt; 2</p>'
    >>> el("line", stroke_width=2)
    '<line stroke-width="2"></line>'
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{given}>" if tag in VOID else f"<{tag}{given}>{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """Several pieces as one."""
    found: list[str] = []
    for child in children:
        if isinstance(child, str):
            found.append(text(child))
        elif child is not None:
            found += [text(one) for one in child if one is not None]
    return Html("".join(found))


def text(value: str) -> Html:
    """Text as markup, with what would be invisible made visible.

    >>> text("<b>\\x07</b>")
    '&lt;b&gt;␇&lt;/b&gt;'
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(INVISIBLE.sub(_picture, value), quote=True))


def clip(text: str, most: int) -> str:
    """Text of at most so many characters, and how many there are when that is not all.

    >>> clip("abcdef", 3)
    'abc… (6 characters)'
    """
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


def _number(value: str | float) -> str:
    """Coordinates need no more than two decimals."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
