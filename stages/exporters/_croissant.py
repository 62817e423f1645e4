"""Croissant metadata of an export (MLCommons, version 1.0), as `mlcroissant` and the Hub read it: files and columns.

Columns that hold lists of structs are left to the dataset card.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pipeline import plugins
from pipeline.records import Exported, arrow_schema
from stages.exporters import CardEntry

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
ENCODINGS = {
    ".parquet": "application/x-parquet",
    ".jsonl": "application/jsonlines",
    ".tar": "application/x-tar",
    ".mds": "application/octet-stream",
}
TYPES = {"string": "sc:Text", "int64": "sc:Integer", "double": "sc:Float", "bool": "sc:Boolean"}


def build_croissant(
    *,
    title: str,
    description: str,
    license: str,
    url: str,
    formats: Sequence[str],
    splits: Sequence[str],
    columns: Collection[str],
) -> dict[str, Any]:
    """The JSON-LD of croissant.json.

    Args:
        title: the name of the dataset.
        description: one paragraph.
        license: an identifier of the Hub; "": not stated.
        url: where the dataset is, if anywhere.
        formats: names of export forms.
        splits: names of the parts of the data set; none: it is one.
        columns: of the data set.
    """
    modules = {name.rpartition(".")[2]: plugins.load("stages.exporters", name) for name in sorted(formats)}
    entries: dict[str, CardEntry] = {name: module.CARD for name, module in modules.items() if hasattr(module, "CARD")}
    files = {name: entry.data_files or entry.files for name, entry in entries.items()}
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": title,
        "description": description,
        **({"license": f"https://choosealicense.com/licenses/{license}/"} if license else {}),
        **({"url": url} if url else {}),
        "distribution": [_describe_files(name, glob, splits) for name, glob in files.items() if glob],
        "recordSet": [
            _describe_rows(name, entries[name], splits, columns)
            for name, glob in files.items()
            if glob.endswith(".parquet")
        ],
    }


def _describe_files(form: str, glob: str, splits: Sequence[str]) -> dict[str, Any]:
    root, _, rest = glob.partition("/")
    includes = [f"{root}/{split}/{rest}" for split in splits] or [glob]
    return {
        "@type": "cr:FileSet",
        "@id": form,
        "name": form,
        "encodingFormat": ENCODINGS.get(PurePosixPath(glob).suffix, "application/octet-stream"),
        "includes": includes if len(includes) > 1 else includes[0],
    }


def _describe_rows(form: str, entry: CardEntry, splits: Sequence[str], columns: Collection[str]) -> dict[str, Any]:
    rows = f"{form}-samples"
    fields = list(_describe_columns(form, rows, entry, columns))
    if splits:
        extract = {"fileSet": {"@id": form}, "extract": {"fileProperty": "fullpath"}}
        pattern = {"transform": {"regex": rf"^.*/({'|'.join(splits)})/.*$"}}
        fields.append(_make_field(rows, "split", "sc:Text", {**extract, **pattern}))
    return {"@type": "cr:RecordSet", "@id": rows, "name": rows, "key": {"@id": f"{rows}/key"}, "field": fields}


def _describe_columns(form: str, rows: str, entry: CardEntry, columns: Collection[str]) -> Iterator[Mapping[str, Any]]:
    types = {field.name: str(field.type) for field in arrow_schema(Exported) if field.name in columns}
    own = {name: "string" for name in (entry.image, entry.caption) if name not in types and name != "image"}
    if entry.image == "image":
        source = {"fileSet": {"@id": form}, "extract": {"column": "image"}, "transform": {"jsonPath": "bytes"}}
        yield _make_field(rows, "image", "sc:ImageObject", source)
    for name, type in {**own, **types}.items():
        if type in TYPES:
            yield _make_field(rows, name, TYPES[type], {"fileSet": {"@id": form}, "extract": {"column": name}})


def _make_field(rows: str, name: str, type: str, source: Mapping[str, Any]) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": f"{rows}/{name}", "name": name, "dataType": type, "source": source}
