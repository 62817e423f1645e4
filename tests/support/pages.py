"""The README and docs/ as data: fenced blocks, command lines, headings and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(recap [^`]+)`(?!`)")
LINK = re.compile(r"\[[^]]*(?:\[[^]]*\][^]]*)*\]\(([^)\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str:
        """The file that its first line names in a comment; "" when it names none."""
        named = re.match(r"# ([\w./-]+\.(?:py|toml))\n", self.text)
        return named[1] if named else ""


def list_blocks(*languages: str, pages: tuple[Path, ...] = PAGES) -> list[Block]:
    return [block for page in pages for block in _blocks(page) if block.language in languages]


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page=page, line=line, language=found[1], text=found[2])


def list_shell_commands() -> list[list[str]]:
    """The arguments of each `recap` command in a shell block, without comments and redirection."""
    lines = [line.removeprefix("$ ") for block in list_blocks("sh", "console") for line in block.text.splitlines()]
    return [shlex.split(re.sub(r" > \S+", "", line), comments=True)[1:] for line in lines if line.startswith("recap ")]


def list_inline_commands() -> list[list[str]]:
    """The arguments of each `recap` command in running text; NAME, DIR and the like stand for values."""
    found = (command for page in PAGES for command in INLINE.findall(page.read_text(encoding="utf-8")))
    return [shlex.split(command)[1:] for command in dict.fromkeys(found)]


def list_links(page: Path) -> list[str]:
    """Link targets outside fenced blocks."""
    return LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def list_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
