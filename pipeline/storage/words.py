"""The number of words of a text, by the pattern of the macro `count_words` of manifests/views.sql.

SQL counts by the macro, everything else by `count_words`; this is the only other place that knows the pattern.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

MACRO = re.compile(r"^CREATE MACRO count_words\b[^;]*;", re.MULTILINE)


@cache
def read_macro() -> str:
    """The statement that defines the macro."""
    text = (resources.files("manifests") / "views.sql").read_text(encoding="utf-8")
    (statement,) = MACRO.findall(text)
    return str(statement)


@cache
def _compile_pattern() -> re.Pattern[str]:
    """The macro's pattern: its code points are written as DuckDB reads them."""
    parts = "".join(re.findall(r"'([^']*)'", read_macro()))
    return re.compile(re.sub(r"\\x\{([0-9a-f]+)\}", lambda match: re.escape(chr(int(match[1], 16))), parts))


def count_words(text: str) -> int:
    """The number of words.

    >>> count_words("A red square."), count_words("赤い square"), count_words("")
    (3, 3, 0)
    """
    return sum(1 for _ in _compile_pattern().finditer(text))
