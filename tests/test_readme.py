"""The README tells of the code as it is: one line per file, in the file's own words."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = (
    *("pipeline", "pipeline/sources", "pipeline/engines", "pipeline/report"),
    *("stages", "stages/scorers", "stages/writers", "stages/training"),
)


def architecture() -> str:
    """The list of files, from the first sentence of each."""
    lines = []
    for room in ROOMS:
        lines.append(f"`{room}/`: {_says(ROOT / room / '__init__.py')}.\n")
        files = sorted((ROOT / room).glob("[!_]*.py")) + sorted((ROOT / room).glob("_[!_]*.py"))
        said = (f"- `{file.name}`: {_says(file)}" for file in files)
        lines += [*(textwrap.fill(line, 120, subsequent_indent="  ") for line in said), ""]
    return "\n".join(lines).strip()


def _says(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    found = re.match(r"(.+?)\.(\s|$)", text.split("\n\n")[0].replace("\n", " "))
    assert found, f"{file} does not say what it decides"
    return found[1].removeprefix("Decides ")


def test_every_file_has_its_line() -> None:
    assert architecture() in (ROOT / "README.md").read_text(), (
        f"the README's list of files should be\n\n{architecture()}"
    )
