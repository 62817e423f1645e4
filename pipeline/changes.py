"""Decides how it is told that rows were made otherwise: what differs in the words and numbers that decide them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.passes import Pass
    from pipeline.tables import Recipe


def changes(old: Recipe, new: Pass | Recipe) -> Iterator[str]:
    """What a person would say has changed in the words and numbers that decide a table's rows."""
    if old.version != new.version:
        yield f"stage {new.stage} is now version {new.version}, was {old.version}"
    yield from _differences(old.slice, new.slice, "")


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{where}.{name}" if where else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}[{index}]")
    elif isinstance(old, str) and isinstance(new, str):
        yield f"{where}: {' '.join(_words(old, new))}"
    else:
        yield f"{where}: {old!r} -> {new!r}"


def _words(old: str, new: str) -> Iterator[str]:
    """Only the words that changed, with one before for the reader's sake."""
    a, b = old.split(), new.split()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            before = f"... {a[i - 1]} " if i else ""
            gone, come = f"[{' '.join(a[i:j])}]", f"[{' '.join(b[k:m])}]"
            yield before + {"insert": f"+{come}", "delete": f"-{gone}"}.get(kind, f"{gone} -> {come}")
    if a == b:
        yield "white space changed"
