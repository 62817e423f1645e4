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
    """The schema of all sections and of each plugin that they may name, with the user's own stages."""
    stages = {name: plugins.load("stages", name) for name in plugins.list_stages(plugins.list_names("stages"))}
    sections = {name: _describe_stage(module) for name, module in stages.items() if hasattr(module, "Config")}
    jobs = {kind: _describe_table(Resources) for kind in JOB_KINDS}
    del jobs["server"]["properties"]["workers"]
    more = {
        "source": _describe_plugins(SOURCES, Corpus),
        "engines": _describe_names(_describe_plugins(ENGINES)),
        "slurm": _describe_table(SlurmSettings, Resources, more=jobs),
    }
    schema = _describe_table(TopLevel, more={**more, **sections})
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "run.toml", **schema, "required": ["source"]}


def _describe_stage(module: ModuleType) -> Schema:
    choice = getattr(module, "PLUGINS", None)
    section = _describe_plugins(choice, module.Config) if choice else _describe_table(module.Config)
    return _describe_names(section) if getattr(module, "NAMED", False) else section


def _describe_names(table: Schema) -> Schema:
    return {"type": "object", "propertyNames": {"pattern": f"^{NAME.pattern}$"}, "additionalProperties": table}


def _describe_plugins(choice: PluginChoice, *common: type) -> Schema:
    """One alternative for each plugin, and one for the user's modules, whose keys are unknown here."""
    selector = choice.selector
    own = {"properties": {selector: {"type": "string", "pattern": r"\."}}, "required": [selector]}
    return {"type": "object", "anyOf": [*_alternatives(choice, common), own]}


def _alternatives(choice: PluginChoice, common: tuple[type, ...]) -> Iterator[Schema]:
    for name in plugins.list_names(choice.package):
        table = _describe_table(
            *common, plugins.load(choice.package, name).Config, more={choice.selector: {"const": name}}
        )
        required = [] if name == choice.default else [choice.selector]
        yield {"title": name, **table, "required": [*required, *table["required"]]}


def _describe_table(*classes: type, more: Mapping[str, Schema] | None = None) -> Schema:
    """A table with the keys of all `classes` and `more`, and no others."""
    found = [
        _inline_refs(schema, schema.get("$defs", {})) for schema in (adapter_of(cls).json_schema() for cls in classes)
    ]
    properties = {name: part for schema in found for name, part in schema["properties"].items()}
    return {
        "type": "object",
        "properties": {**properties, **(more or {})},
        "required": [name for schema in found for name in schema.get("required", [])],
        "additionalProperties": False,
    }


def _inline_refs(part: Any, definitions: Mapping[str, Schema]) -> Any:
    """The schema with its references replaced by what they refer to, and without pydantic's titles."""
    if isinstance(part, list):
        return [_inline_refs(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        part = part | definitions[part["$ref"].rpartition("/")[2]]
    noise = {"$ref", "$defs", *(["title"] if isinstance(part.get("title"), str) else [])}
    return {name: _inline_refs(value, definitions) for name, value in part.items() if name not in noise}
