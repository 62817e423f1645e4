"""What a model is asked to list: the prompt, the schema of one thing, and how its boxes are read.

Questions are the TOML files of this directory and of `<run>/finders`. They know neither the model nor pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engines import Reply, Request
from pipeline.records import Found
from pipeline.sections import key
from pipeline.validation import read_toml
from stages.finders import FinderInput
from stages.finders._annotations import Frame, list_boxes
from stages.text import json_schema
from stages.text.answers import read_value
from stages.text.json_schema import object_schema
from stages.text.prompts import SamplingConfig, check_fields, fence_text, fill_template

FIELDS = ("alt_text",)
NO_ALT_TEXT = "(none)"


def default_schema() -> dict[str, Any]:
    number = {"type": "number", "minimum": 0}
    box = {"type": "array", "items": number, "minItems": 4, "maxItems": 4}
    return object_schema({"label": {"type": "string", "minLength": 1}, "box": box})


@dataclass(frozen=True, kw_only=True)
class QuestionSpec:
    """The keys of a finder's TOML file."""

    system: str = key("", "the system message; empty: none")
    prompt: str = key(help="the prompt; {alt_text} is replaced by the sample's alt text, fenced")
    max_alt_text: int = key(1000, "characters of alt text to show", least=1)
    max_found: int = key(32, "things in a list, at most", least=1)
    scale: float = key(1000.0, "the number that a box has at the right and at the lower edge", least=1)
    sampling: SamplingConfig = key(factory=SamplingConfig)
    schema: dict[str, Any] = key(
        factory=default_schema,
        help="JSON Schema of one thing, an object with a label, and a box, text or confidence; others go to `other`",
    )

    def __post_init__(self) -> None:
        check_fields(self.prompt, FIELDS, where="prompt")
        json_schema.check_schema(self.schema)
        if "label" not in self.schema.get("properties", {}):
            raise ValueError("schema.properties has no label, the name of a thing")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of the finder that asks."""

    engine: str = key(help="a name in [engines]", stamp=False)
    spec: QuestionSpec = key(stamp="words")

    @property
    def labels(self) -> list[str] | None:
        """Those that the schema lists as an `enum`; None: any is allowed."""
        names = self.spec.schema["properties"]["label"].get("enum")
        return None if names is None else [str(name).strip() for name in names]


def load(name: str, *, run: Path | None) -> QuestionSpec:
    """The question `name` of the run, else of those that ship.

    Raises:
        UnknownNameError: no such question exists.
        ConfigError: its file is not a valid question.
    """
    return read_toml(name, folder="finders", run=run).parse(QuestionSpec)


def build_request(item: FinderInput, spec: QuestionSpec) -> Request:
    alt_text = item.image.alt_text
    shown = fence_text(alt_text, limit=spec.max_alt_text) if alt_text and alt_text.strip() else NO_ALT_TEXT
    return Request(
        id=item.image.key,
        system=spec.system,
        prompt=fill_template(spec.prompt, {"alt_text": shown}).strip(),
        images=(item.data(),),
        source_key=item.image.source_key,
        schema=json.dumps(build_schema(spec), ensure_ascii=False),
        ladder=spec.sampling.rungs,
        accept=lambda reply: read_answer(reply, spec)[1],
        seed=item.seed,
    )


def build_schema(spec: QuestionSpec) -> dict[str, Any]:
    """JSON Schema of the answer."""
    return object_schema({"found": {"type": "array", "items": spec.schema, "maxItems": spec.max_found}})


def read_answer(reply: Reply, spec: QuestionSpec) -> tuple[tuple[Found, ...], str]:
    """The things in an answer, and the problem with it; "" if there is none."""
    try:
        value = read_value(reply, build_schema(spec))
        return tuple(list_boxes(value["found"], Frame(size=(spec.scale, spec.scale)), path="found")), ""
    except ValueError as error:
        return (), str(error)
