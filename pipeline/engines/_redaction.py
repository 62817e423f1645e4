"""Redaction: texts of a server in messages and rows, without the API key, on one line, and short.

The whole text is masked before it is cut, since half a key is still a secret.
"""

from __future__ import annotations

import json
import re

MAX_QUOTED = 300  # characters of a server's response that a message quotes
MIN_SECRET = 8  # characters: shorter keys, such as EMPTY, are ordinary words, and answers may hold them
MASK = "***"
# What a message leaves out or shows as a blank, as it is and as JSON writes it.
GAP = r"(?:[\s\x00-\x1f\x7f\xad\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd\ud800-\udfff]|\\[nrtbf]|\\u[0-9a-fA-F]{4})*"
GAP_IN_BYTES = r"(?:[\s\x00-\x1f\x7f]|\\[nrtbf]|\\u[0-9a-fA-F]{4})*"  # what else is in the parsed text is masked there


class Redactor:
    """Masks one API key in any mixture of plain, JSON and URL escapes. An empty key masks nothing."""

    def __init__(self, key: str) -> None:
        self._text = re.compile(_match_key(key, GAP) + _match_start(key)) if key else None
        self._bytes = re.compile(_match_key(key, GAP_IN_BYTES).encode()) if key else None
        self._is_secret = len(key) >= MIN_SECRET

    def mask(self, text: str) -> str:
        return self._text.sub(MASK, text) if self._text else text

    def mask_answer(self, text: str) -> str:
        """As `mask`, but leaves keys that are ordinary words."""
        return self.mask(text) if self._is_secret else text

    def mask_body(self, body: bytes) -> bytes:
        """As `mask_answer`, of a response before it is parsed."""
        return self._bytes.sub(MASK.encode(), body) if self._bytes and self._is_secret else body

    def quote(self, text: str) -> str:
        """The masked text as a message shows it: printable, on one line, at most MAX_QUOTED characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self.mask(text)).split())
        return line[:MAX_QUOTED]


def _match_key(key: str, gap: str) -> str:
    """A pattern of the key with any number of `gap` between its characters."""
    return gap.join(map(_match_escaped, key))


def _match_start(key: str) -> str:
    """An alternative: the first half of the key, as where a server cut it off, with the characters after it."""
    half = max(len(key) // 2, MIN_SECRET)
    return f"|{_match_key(key[:half], GAP)}\\S{{0,{len(key) - half}}}" if len(key) > half else ""


def _match_escaped(char: str) -> str:
    """A pattern of a character as it is, as JSON may write it, and as URLs may."""
    units = char.encode("utf-16-be", "surrogatepass")
    numbers = "".join(rf"\\u(?i:{units[i : i + 2].hex()})" for i in range(0, len(units), 2))
    quoted = "".join(f"%(?i:{byte:02x})" for byte in char.encode("utf-8", "surrogatepass"))
    short = re.escape(json.dumps(char)[1:-1])
    return f"(?:{re.escape(char)}|{short}|{numbers}|{quoted})"
