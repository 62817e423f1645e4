"""The JSON Schema of run.toml, for editors, made from the dataclasses that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from pipeline import plugins
from pipeline.config import JOB_KINDS
from pipeline.sections import ENGINES, SOURCES, Corpus, PluginChoice, Resources, SlurmSettings, TopLevel
from pipeline.validation import NAME, adapter_of

Schema = dict[str, Any]


def build_schema() -> Schema:
    """Every section, with each plugin that can be named in it; `[slurm.STAGE]` and sections of user stages too."""
    stages = {name: plugins.load("stages", name) for name in plugins.list_stages(plugins.list_names("stages"))}
    sections = {name: _stage(module) for name, module in stages.items() if hasattr(module, "Config")}
    jobs = {kind: _table(Resources) for kind in JOB_KINDS}
    del jobs["server"]["properties"]["workers"]
    more = {
        "source": _plugins(SOURCES, Corpus),
        "engines": _by_name(_plugins(ENGINES)),
        "slurm": _table(SlurmSettings, Resources, more=jobs),
    }
    schema = _table(TopLevel, more={**more, **sections})
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "run.toml", **schema, "required": ["source"]}


def _stage(module: ModuleType) -> Schema:
    choice = getattr(module, "PLUGINS", None)
    section = _plugins(choice, module.Config) if choice else _table(module.Config)
    return _by_name(section) if getattr(module, "NAMED", False) else section


def _by_name(table: Schema) -> Schema:
    return {"type": "object", "propertyNames": {"pattern": f"^{NAME.pattern}$"}, "additionalProperties": table}


def _plugins(choice: PluginChoice, *common: type) -> Schema:
    """One alternative for each plugin, and one for modules of the user's own, whose keys are unknown here."""
    selector = choice.selector
    own = {"properties": {selector: {"type": "string", "pattern": r"\."}}, "required": [selector]}
    return {"type": "object", "anyOf": [*_alternatives(choice, common), own]}


def _alternatives(choice: PluginChoice, common: tuple[type, ...]) -> Iterator[Schema]:
    for name in plugins.list_names(choice.package):
        table = _table(*common, plugins.load(choice.package, name).Config, more={choice.selector: {"const": name}})
        required = [] if name == choice.default else [choice.selector]
        yield {"title": name, **table, "required": [*required, *table["required"]]}


def _table(*classes: type, more: Mapping[str, Schema] | None = None) -> Schema:
    """A closed table with the keys of all `classes`, and `more`."""
    found = [_inline(schema, schema.get("$defs", {})) for schema in (adapter_of(cls).json_schema() for cls in classes)]
    properties = {name: part for schema in found for name, part in schema["properties"].items()}
    return {
        "type": "object",
        "properties": {**(more or {}), **properties},
        "required": [name for schema in found for name in schema.get("required", [])],
        "additionalProperties": False,
    }


def _inline(part: Any, definitions: Mapping[str, Schema]) -> Any:
    """The schema with the tables it refers to in their places, and without pydantic's titles."""
    if isinstance(part, list):
        return [_inline(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        part = part | definitions[part["$ref"].rpartition("/")[2]]
    noise = {"$ref", "$defs", *(["title"] if isinstance(part.get("title"), str) else [])}
    return {name: _inline(value, definitions) for name, value in part.items() if name not in noise}
