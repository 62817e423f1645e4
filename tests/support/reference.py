"""The generated parts of docs/: every key of run.toml, recipes and rubrics, and every column of the tables.

    python -m tests.support.reference      # or: make docs

Keys come from the `Config` dataclasses, columns and their comments from pipeline/records.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline import plugins, records, sections
from pipeline.commands.init import format_toml
from pipeline.storage.database import RECORDS
from pipeline.validation import describe_type
from stages import canary, caption, curate, export, find, recipes, rubric, rubrics, score
from stages import filter as filter_stage
from stages.finders import _questions as finder_questions
from stages.recipes import _steps as recipe_steps
from stages.rubric_writers import llm
from stages.text.prompts import SamplingConfig

DOCS = Path(__file__).parent.parent.parent / "docs"
CONFIGURATION = DOCS / "configuration.md"
TABLES = DOCS / "sql-and-tables.md"
MARKERS = "<!-- generated: the columns of pipeline/records.py -->", "<!-- end of the generated part -->"

UNSTAMPED = {"max_error_share"}  # in no fingerprint, although declared like keys that are
READ_FROM_FILE = {"flags"}  # the file's content is in the fingerprint, not its name
SQL_TYPES = {"str": "VARCHAR", "int": "BIGINT", "float": "DOUBLE", "bool": "BOOLEAN"}

COMMON = "these keys, and those of its kind:"

INTRODUCTION = """\
# Configuration

Every key of `run.toml`, of recipes and of rubrics. `make docs` writes this page from the dataclasses that read the
files; `recap init` writes the same explanations into a new `run.toml`.

Unknown keys are errors. A key without a default is required. Relative paths start at the directory of `run.toml`.
Changing a key marked **yes** under *Decides rows* makes the tables that it decides stale, and every table made from
them; `recap run --stale redo` remakes those. The other keys can be changed at any time.

A plugin section (`[source]`, `[engines.NAME]`, `[find.NAME]`, `[score.NAME]`) names its plugin with `kind`, either
one listed here or a module of your own with a dot in its name: see [Extending](extending.md).

Editors complete and check run.toml with its JSON Schema. With a TOML plugin based on Taplo, write the schema once and
name it in the first line of run.toml, as `#:schema ./run.schema.json`:

```sh
recap schema > run.schema.json
```
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A section of the configuration page."""

    title: str
    classes: tuple[type, ...] = ()
    text: str = ""
    level: int = 2
    decides: bool = True  # whether any of its keys decides rows

    def render(self) -> str:
        lines = [f"{'#' * self.level} {self.title}", ""]
        lines += [*textwrap.wrap(self.text, 120), ""] if self.text else []
        rows = [list(row) for cls in self.classes for row in key_rows(cls)]
        if rows:
            rows = [["Key", "Type", "Default", "Decides rows", "Meaning"], ["---"] * 5, *rows]
            lines += [_row(*(row if self.decides else (*row[:3], row[4]))) for row in rows]
            lines.append("")
        elif not self.text:
            lines += ["No keys of its own.", ""]
        return "\n".join(lines)


def configuration_parts() -> Iterator[Part]:
    yield Part(title="Top level", classes=(sections.TopLevel,))
    yield Part(title="`[source]`", classes=(sections.Corpus,), text=f"Every source has {COMMON}")
    yield from _plugin_parts("pipeline.sources", "kind = {kind}")
    yield Part(
        title="`[engines.NAME]`",
        text="A model and how it is reached. NAME is what other sections call it. Tables for the kinds:",
    )
    yield from _plugin_parts("pipeline.engines", "kind = {kind}")
    serve = plugins.load("pipeline.engines", "openai").Serve
    yield Part(title="`[engines.NAME.serve]`", classes=(serve,), text="How `recap serve NAME` starts vLLM.", level=3)
    yield Part(
        title="`[curate]`",
        classes=(curate.Config,),
        text="Without this section every image that is ok is captioned. See [Curation](curation.md).",
    )
    yield Part(
        title="`[find.NAME]`",
        classes=(find.Config,),
        text=f"Every finder has {COMMON} See [Finders](recipes-and-rubrics.md#finders).",
    )
    yield from _plugin_parts("stages.finders", "kind = {kind}")
    yield Part(title="`[caption.NAME]`", classes=(caption.Config,))
    yield Part(title="`[rubric.NAME]`", classes=(rubric.Config,))
    yield Part(title="`[score.NAME]`", classes=(score.Config,), text=f"Every scorer has {COMMON}")
    yield from _plugin_parts("stages.scorers", "kind = {kind}")
    yield Part(
        title="`[canary]`",
        classes=(canary.Config,),
        text="Without this section no spoiled copies are scored. See [Quality](quality.md#what-the-judge-notices).",
    )
    yield Part(title="`[filter]`", classes=(filter_stage.Config,))
    yield Part(title="`[export]`", classes=(export.Config,))
    train = plugins.load("stages", "train").Config
    yield Part(title="`[train]`", classes=(train,), text="Every method has these keys, and those of its own:")
    yield from _plugin_parts("stages.training.methods", "method = {kind}")
    yield Part(
        title="`[slurm]`",
        classes=(sections.SlurmSettings,),
        text="These keys, and those of `[slurm.STAGE]`. None decides rows.",
        decides=False,
    )
    yield Part(
        title="`[slurm.STAGE]`",
        classes=(sections.Resources,),
        text="What the jobs of a stage request; a stage without a section uses `[slurm]`. `[slurm.server]` is for the"
        " jobs that serve engines.",
        decides=False,
    )
    yield Part(title="A recipe", classes=(recipes.RecipeSpec,), text="A file of `recipes/`.")
    yield Part(
        title="A recipe of several questions",
        classes=(recipe_steps.ChainSpec,),
        text="A file of `recipes/` with `[[steps]]`, or with `program`. See"
        " [Several questions for one caption](recipes-and-rubrics.md#several-questions-for-one-caption).",
    )
    yield Part(title="`[[steps]]` of a recipe", classes=(recipe_steps.StepSpec,), level=3)
    yield Part(title="A rubric", classes=(rubrics.RubricSpec,), text="A file of `rubrics/`.")
    yield Part(title="`[[criteria]]` of a rubric", classes=(rubrics.Question,), level=3)
    yield Part(title="A finder's question", classes=(finder_questions.QuestionSpec,), text="A file of `finders/`.")
    yield Part(title="A rubric writer's prompt", classes=(llm.WriterSpec,), text="A file of `writers/`.")
    yield Part(
        title="`[sampling]` of a recipe, a rubric, a finder's question or a writer's prompt",
        classes=(SamplingConfig,),
    )


def _plugin_parts(package: str, title: str) -> Iterator[Part]:
    for kind in plugins.list_names(package):
        module = plugins.load(package, kind)
        if hasattr(module, "Config"):
            yield Part(title=f"`{title.format(kind=format_toml(kind))}`", classes=(module.Config,), level=3)


def key_rows(cls: Any) -> Iterator[tuple[str, str, str, str, str]]:
    """Key, type, default, whether it decides rows, and meaning of each field that users set."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("shown", True):
            stamped = field.metadata.get("stamp", True) or field.name in READ_FROM_FILE
            yield (
                f"`{field.name}`",
                _type(hints[field.name], field),
                _default(field),
                "yes" if stamped and field.name not in UNSTAMPED else "no",
                field.metadata.get("help", ""),
            )


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


def _type(hint: Any, field: dataclasses.Field[Any]) -> str:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a table"
    least, most = field.metadata.get("least"), field.metadata.get("most")
    bounds = "" if least is None and most is None else f", at least {least}" if most is None else f", at most {most}"
    if least is not None and most is not None:
        bounds = f", {least} to {most}"
    return describe_type(hint) + bounds


def _default(field: dataclasses.Field[Any]) -> str:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is MISSING:
        return "required"
    if default is None or dataclasses.is_dataclass(default):
        return "none" if default is None else ""
    return f"`{format_toml(default)}`"


def render_configuration(parts: Iterable[Part]) -> str:
    return "\n".join([INTRODUCTION, *(part.render() for part in parts)])


def render_tables() -> str:
    """Every table's columns, then the structs that are columns of them."""
    structs = (
        records.Found,
        records.CaptionStep,
        records.Criterion,
        records.RubricCriterion,
        records.NamedScore,
        records.ExportedText,
    )
    return "\n".join(
        [
            *(line for record in RECORDS for line in _columns(f"`{record.table}`", record)),
            *(line for struct in structs for line in _columns(f"The struct `{struct.__name__}`", struct)),
        ]
    )


def _columns(title: str, record: type) -> Iterator[str]:
    yield from (f"### {title}", "", " ".join((record.__doc__ or "").split()), "", "| Column | Type | Meaning |")
    yield "| --- | --- | --- |"
    comments, hints = _comments(record), get_type_hints(record)
    for field in dataclasses.fields(record):
        sql_type, choices = _column_type(hints[field.name])
        yield _row(f"`{field.name}`", sql_type, "; ".join(filter(None, [choices, comments.get(field.name, "")])))
    yield ""


def _column_type(hint: Any) -> tuple[str, str]:
    """The SQL type, and the allowed values of a column that has a fixed set of them."""
    if type(None) in (args := get_args(hint)):
        (plain,) = (arg for arg in args if arg is not type(None))
        name, choices = _column_type(plain)
        return f"{name} or NULL", choices
    if get_origin(hint) is Literal:
        return "VARCHAR", ", ".join(f"`{value}`" for value in args)
    if get_origin(hint) is tuple:
        return f"{_column_type(args[0])[0]}[]", ""
    return SQL_TYPES.get(hint.__name__, hint.__name__), ""


def _comments(record: type) -> dict[str, str]:
    """Field -> the comment on its line."""
    lines = inspect.getsource(record).splitlines()
    found = (re.match(r"    (\w+): [^#]*#\s*(.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def replace_tables(page: str) -> str:
    """The page with its generated part as the code has it now."""
    before, _, rest = page.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    return f"{before}{MARKERS[0]}\n\n{render_tables()}\n{MARKERS[1]}{after}"


def main() -> None:
    CONFIGURATION.write_text(render_configuration(configuration_parts()), encoding="utf-8")
    TABLES.write_text(replace_tables(TABLES.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
