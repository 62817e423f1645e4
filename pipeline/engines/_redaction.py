"""Redaction: texts of a server in messages and rows, without the API key, on one line, and short.

The whole text is masked before it is cut, since half a key is still a secret.
"""

from __future__ import annotations

import json
from urllib.parse import quote

MAX_QUOTED = 300  # characters of a server's response that a message quotes
MIN_SECRET = 8  # characters: shorter keys, such as EMPTY, are ordinary words, and answers may hold them
MASK = "***"


class Redactor:
    """Masks one API key, plain, as JSON writes it, and as URLs write it. An empty key masks nothing."""

    def __init__(self, key: str) -> None:
        forms = {key, json.dumps(key)[1:-1], quote(key, safe=""), quote(key)} if key else set()
        self._forms = sorted(forms, key=len, reverse=True)
        self._is_secret = len(key) >= MIN_SECRET

    def mask(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, MASK)
        return text

    def mask_answer(self, text: str) -> str:
        """As `mask`, but leaves keys that are ordinary words."""
        return self.mask(text) if self._is_secret else text

    def mask_body(self, body: bytes) -> bytes:
        """As `mask_answer`, of a response before it is parsed."""
        for form in self._forms if self._is_secret else ():
            body = body.replace(form.encode(), MASK.encode())
        return body

    def quote(self, text: str) -> str:
        """The masked text as a message shows it: printable, on one line, at most MAX_QUOTED characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self.mask(text)).split())
        return line[:MAX_QUOTED]
