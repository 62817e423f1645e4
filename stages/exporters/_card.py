"""The dataset card of an export, with the header that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pipeline import plugins
from stages.exporters import CardEntry

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**12, "n>1B"),
)


VIEWED = ("parquet", "webdataset", "messages", "llava")  # whose images the Hub's viewer shows, the best first
EMPTY = "**This data set is empty: no caption was kept.**\n\n"
OPTIONAL = {  # column -> what it is
    "reencoded": "how an image was encoded again, upright and perhaps smaller; empty: the original file",
    "written_sha256": "of the image here, if it was encoded again; `sha256` is always the original's",
    "texts": "all kept captions",
    "weight": "of the sample",
    "num_tokens": "of the caption",
    "cut": "tokens that were cut off at the caption's end",
}


def build_card(
    stats: Mapping[str, Any],
    *,
    title: str,
    source: str,
    license: str,
    formats: Iterable[str],
    splits: Iterable[str] = (),
    rules: Mapping[str, str],
    notes: Iterable[str] = (),
    columns: Collection[str] = (),
) -> str:
    """The text of README.md.

    Args:
        stats: the content of stats.json.
        title: the name of the dataset.
        source: the kind of the corpus's source.
        license: an identifier of the Hub; "": not stated.
        formats: names of export forms.
        splits: names of the parts of the data set; none: it is one.
        rules: name -> SQL condition of the filter.
        notes: sentences about the choice of texts.
        columns: of the data set.
    """
    num_samples = stats["num_samples"]
    size = next((name for limit, name in SIZES if num_samples < limit), SIZES[-1][1])
    licence = f"license: {license}\n" if license else ""
    modules = {name: plugins.load("stages.exporters", name) for name in sorted(formats)}
    entries: dict[str, CardEntry] = {name: module.CARD for name, module in modules.items() if hasattr(module, "CARD")}
    shown = sorted(entries, key=lambda name: (VIEWED.index(name) if name in VIEWED else len(VIEWED), name))
    data_files = next((entries[name].data_files for name in shown if entries[name].data_files), "")
    files = _list_files(data_files, splits)
    configs = f"configs:\n- config_name: default\n  data_files:{files}\n" if data_files else ""
    images = " / ".join(f"`{entry.image}`" for entry in entries.values()) or "image"
    texts = " / ".join(f"`{entry.caption}`" for entry in entries.values()) or "caption"
    captions = "\n".join(
        f"- `{c['pass']}`: {c['num_samples']:,} captions by `{c['model']}`"
        if c["model"]
        else f"- `{c['pass']}`: {c['num_samples']:,} alt texts of the corpus"
        for c in stats["captions"]
    )
    captions = "\n\n".join([captions, *notes])
    optional = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in OPTIONAL.items() if name in columns)
    conditions = "\n".join(f"- `{name}`: `{sql}`" for name, sql in rules.items())
    return f"""---
{licence}task_categories:
- image-to-text
- text-to-image
size_categories:
- {size}
{configs}---

# {title}

{EMPTY if not num_samples else ""}\
{num_samples:,} images with captions, {stats["mean_words"]:.1f} words on average (the corpus's own alt text: \
{stats["mean_alt_text_words"]:.1f}). Made by recap from a `{source}` source; image bytes are the originals'\
{", except where `reencoded` says otherwise" if "reencoded" in columns else ""}.

{captions}

A caption was kept when it met these conditions, in this order:

{conditions or "- (none)"}

| column | what it is |
| --- | --- |
| {images} | the original file |
| {texts} | the caption |
| `alt_text` | what the corpus had; empty when it had nothing |
| `key`, `source_key`, `sha256` | the sample in this run, in the corpus, and its content: join on the last two |
| `caption_pass`, `candidate`, `model`, `revision` | who wrote the caption |
| `scores` | what the scorers said, in [0, 1] |
| `fields` | the caption's structured answer, as JSON |
| `format`, `width`, `height`, `num_bytes`, `metadata` | of the original |
| `orientation` | the EXIF orientation of the file, 1 to 8; `width` and `height` are of the upright picture |
{optional}"""


def _list_files(glob: str, splits: Iterable[str]) -> str:
    """The value of `data_files`: a glob, or one for each split, in the split's folder."""
    form, _, rest = glob.partition("/")
    parts = "".join(f"\n  - split: {split}\n    path: {form}/{split}/{rest}" for split in splits)
    return parts or f" {glob}"
